"""Models from files and from other libraries, and into files."""
