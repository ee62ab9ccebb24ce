"""Everything that can go wrong between a caller and the service, on loopback, and a referee who judges what comes of it."""
