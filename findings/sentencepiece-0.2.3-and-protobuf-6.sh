#!/usr/bin/env bash
# sentencepiece 0.2.3 beside protobuf 6.33.6: pip installs the two together without a complaint (the
# wheel names no protobuf), and importing the model's protobuf classes, as transformers does to read a
# folder that has a tokenizer.model only, raises VersionError: the classes in the wheel were made by
# protobuf 7. sentencepiece 0.2.2 and protobuf 6.33.6 go together.
#
# Output seen:
#   sentencepiece 0.2.3: VersionError
#   sentencepiece 0.2.2: imported
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv env
try() {
  env/bin/pip install --quiet "sentencepiece==$1" protobuf==6.33.6
  env/bin/python - <<'PYTHON'
try:
    from sentencepiece import sentencepiece_model_pb2  # noqa: F401

    print("imported")
except Exception as error:
    print(type(error).__name__)
PYTHON
}
for version in 0.2.3 0.2.2; do
  found=$(try $version); echo "sentencepiece $version: $found"
  case "$version $found" in
    "0.2.3 VersionError" | "0.2.2 imported") ;;
    *) echo "this has changed"; exit 1 ;;
  esac
done
