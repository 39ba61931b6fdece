"""flatradix inside other engines. Each module imports the engine that it is for; `import flatradix` imports none."""
