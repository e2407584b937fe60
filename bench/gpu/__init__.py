"""What needs a GPU: `python -m gpu` runs the steps, each a file here, and makes the report."""
