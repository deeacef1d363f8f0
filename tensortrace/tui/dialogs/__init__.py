"""What opens over the main screen: lists to choose from, questions, the help."""
