"""What the tasting room is made of: its words and its taste."""
