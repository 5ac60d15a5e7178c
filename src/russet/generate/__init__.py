"""From a specification to pictures: guidance, sampling, and handling of overflow."""
