"""What the method can be read without: each module is imported by its name."""
