"""The backend for SGLang. SGLang loads `plugin`. `index` works without SGLang."""
