"""What stands behind the decisions in docs/: alternatives measured in turns, a subject a file."""
