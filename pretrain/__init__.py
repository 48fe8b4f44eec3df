"""What the shipped bases were trained on, and how."""
