"""What is learned and how: the recipe file, its keys, its errors in words."""
