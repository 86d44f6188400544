#!/usr/bin/env python3
"""Writes a simplestreams tree of one product: stream-publish.py DIRECTORY META ROOT SERIAL [FIELD=VALUE …]

META and ROOT (tar.xz or squashfs) become a version SERIAL of the product `tiny`; versions that are there stay. FIELD=VALUE
changes what is said of the root, to lie with.
"""
import hashlib
import json
import os
import shutil
import sys

top, meta, root, serial = sys.argv[1:5]
changes = dict(c.split("=", 1) for c in sys.argv[5:])


def sha(*files):
    h = hashlib.sha256()
    for f in files:
        h.update(open(f, "rb").read())
    return h.hexdigest()


base = f"images/tiny/{serial}"
os.makedirs(f"{top}/{base}", exist_ok=True)
os.makedirs(f"{top}/streams/v1", exist_ok=True)
ftype = "squashfs" if root.endswith("squashfs") else "root.tar.xz"
items = {}
for name, source, kind in [("incus.tar.xz", meta, "incus.tar.xz"), ("root", root, ftype)]:
    path = f"{base}/{name}"
    shutil.copy(source, f"{top}/{path}")
    items[name] = {"ftype": kind, "path": path, "sha256": sha(source), "size": os.path.getsize(source)}
both = "combined_squashfs_sha256" if ftype == "squashfs" else "combined_rootxz_sha256"
items["incus.tar.xz"][both] = sha(meta, root)
for field, value in changes.items():
    if field == "combined":
        items["incus.tar.xz"][both] = value
    else:
        items["root"][field] = int(value) if field == "size" else value
file = f"{top}/streams/v1/images.json"
products = {"content_id": "images", "datatype": "image-downloads", "format": "products:1.0", "products": {}}
if os.path.exists(file):
    products = json.load(open(file))
product = products["products"].setdefault(
    "tiny:one:amd64:default",
    {"aliases": "tiny,tiny/one", "arch": "amd64", "os": "Tiny", "release": "one", "release_title": "one", "versions": {}},
)
product["versions"][serial] = {"items": items}
json.dump(products, open(file, "w"))
index = {"format": "index:1.0", "index": {"images": {
    "datatype": "image-downloads", "path": "streams/v1/images.json", "format": "products:1.0", "products": list(products["products"])}}}
json.dump(index, open(f"{top}/streams/v1/index.json", "w"))
print(sha(meta, root))
