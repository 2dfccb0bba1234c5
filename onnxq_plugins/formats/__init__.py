"""A QDQ model in the file format of another runtime: one folder per format."""
