"""A formula written out as steps: traced, rewritten, differentiated, counted, recorded."""
