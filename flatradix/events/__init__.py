"""Events: what is cached, told to routers block by block."""
