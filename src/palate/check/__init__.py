"""`palate check`: what a recipe, a data set or a model would do, seen before anything runs."""
