"""flatradix inside other engines. Each package imports its engine; `import flatradix` imports none of them."""
