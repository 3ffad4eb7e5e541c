"""Device and dtype choice, keyed random numbers, atomic files, logging, distributed helpers."""
