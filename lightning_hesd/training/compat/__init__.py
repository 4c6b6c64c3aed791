"""Private names and rules of Lightning that the package needs, in both of its namespaces."""
