"""The backend for SGLang. `plugin` is what SGLang loads; `index` needs no SGLang."""
