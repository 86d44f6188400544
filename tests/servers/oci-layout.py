#!/usr/bin/env python3
"""oci-layout.py OUT.tar CONFIG.json LAYER.tar…: an archive of an OCI layout of these layers; prints its digest.
oci-layout.py --push HOST:PORT NAME:TAG CA.crt OUT.tar [USER FILE]: puts the image of such an archive into a registry, as this user
with the password in the file."""
import base64, hashlib, http.client, io, json, ssl, sys, tarfile, urllib.parse

OCI = "application/vnd.oci.image."


def make(out, config, layers):
    blobs = {}

    def put(data, kind):
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        blobs[digest] = data
        return {"mediaType": OCI + kind, "digest": digest, "size": len(data)}

    described = [put(open(layer, "rb").read(), "layer.v1.tar") for layer in layers]
    diffs = [layer["digest"] for layer in described]
    image = {"architecture": "amd64", "os": "linux", "config": json.load(open(config)),
             "rootfs": {"type": "layers", "diff_ids": diffs}}
    manifest = {"schemaVersion": 2, "mediaType": OCI + "manifest.v1+json",
                "config": put(json.dumps(image).encode(), "config.v1+json"), "layers": described}
    manifest = put(json.dumps(manifest).encode(), "manifest.v1+json")
    index = json.dumps({"schemaVersion": 2, "manifests": [manifest]}).encode()
    with tarfile.open(out, "w") as archive:
        files = [("oci-layout", b'{"imageLayoutVersion":"1.0.0"}'), ("index.json", index)]
        for name, data in files + [("blobs/" + d.replace(":", "/"), b) for d, b in blobs.items()]:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    print(manifest["digest"].split(":")[1])


def push(registry, reference, authority, path, user=None, password=None):
    name, tag = reference.split(":")
    archive = tarfile.open(path)
    read = lambda n: archive.extractfile(n).read()
    link = http.client.HTTPSConnection(registry, timeout=30, context=ssl.create_default_context(cafile=authority))

    shown = {}
    if user:
        shown["Authorization"] = "Basic " + base64.b64encode(f"{user}:{open(password).read().strip()}".encode()).decode()

    def ask(method, where, body=b"", **headers):
        link.request(method, where, body, {**shown, **{k.replace("_", "-"): v for k, v in headers.items()}})
        answer = link.getresponse()
        text = answer.read()
        if answer.status >= 300:
            sys.exit(f"{method} {where}: {answer.status} {text}")
        return answer

    manifest = read("blobs/" + json.loads(read("index.json"))["manifests"][0]["digest"].replace(":", "/"))
    described = json.loads(manifest)
    for blob in [described["config"], *described["layers"]]:
        begun = ask("POST", f"/v2/{name}/blobs/uploads/").getheader("Location")
        where = urllib.parse.urlsplit(begun)
        query = (where.query + "&" if where.query else "") + "digest=" + blob["digest"]
        ask("PUT", f"{where.path}?{query}", read("blobs/" + blob["digest"].replace(":", "/")),
            Content_Type="application/octet-stream")
    ask("PUT", f"/v2/{name}/manifests/{tag}", manifest, Content_Type=OCI + "manifest.v1+json")


if sys.argv[1] == "--push":
    push(*sys.argv[2:])
else:
    make(sys.argv[1], sys.argv[2], sys.argv[3:])
