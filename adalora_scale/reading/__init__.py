"""Files that somebody else may have written: read within limits, checked against a schema, refused in one line.

`text` reads what people write, `json_text` JSON, `headers` the headers of safetensors files, `folders` says which files
of a folder are its own, `schemas` what the files of this project and of its neighbours hold, `patterns` matches PEFT's
regular expressions in bounded time, `base_config` looks at a base model's folder before transformers does, `checksums`
are over tensors, `written` is what a quantised base's own record says of its files.
"""
