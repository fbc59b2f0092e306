"""What a family of models is called and what it is made of."""
