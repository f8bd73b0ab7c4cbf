"""Complete configs that ship with the package, and the data and base model of the first run."""
