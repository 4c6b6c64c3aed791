"""What the package needs of Lightning beyond its public interface, in both of its namespaces."""
