//! simplestreams: an index names files of products, a product has versions, a version has files.

use super::{
    Count, Sink, checked_fingerprint, checked_name, checked_properties, differs, https::Https, nonsense,
};
use karst_engine::images::{
    ImagePart,
    remote::{Parts, RemoteImage, RemoteSource},
};
use karst_model::{Config, Error, Result, instance::InstanceKind};
use serde::Deserialize;
use std::collections::BTreeMap;

/// Longest index and longest file of products.
const INDEX: u64 = 1 << 20;
const PRODUCTS: u64 = 64 << 20;
/// Files of products that are read of one index.
const FILES: usize = 16;

#[derive(Deserialize)]
struct Index {
    index: BTreeMap<String, Entry>,
}

#[derive(Deserialize)]
struct Entry {
    #[serde(default)]
    datatype: String,
    path: String,
    #[serde(default)]
    products: Vec<String>,
}

#[derive(Deserialize)]
struct Products {
    products: BTreeMap<String, Product>,
}

#[derive(Deserialize)]
struct Product {
    #[serde(default)]
    aliases: String,
    #[serde(default)]
    arch: String,
    #[serde(default)]
    os: String,
    #[serde(default)]
    release: String,
    #[serde(default)]
    release_title: String,
    #[serde(default)]
    version: String,
    #[serde(default)]
    variant: String,
    #[serde(default)]
    support_eol: String,
    #[serde(default)]
    requirements: BTreeMap<String, String>,
    #[serde(default)]
    versions: BTreeMap<String, Version>,
}

#[derive(Deserialize)]
struct Version {
    #[serde(default)]
    items: BTreeMap<String, Item>,
    #[serde(default)]
    label: String,
}

#[derive(Deserialize, Default)]
struct Item {
    #[serde(default)]
    ftype: String,
    #[serde(default)]
    path: String,
    #[serde(default)]
    sha256: String,
    #[serde(default)]
    size: u64,
    #[serde(default)]
    combined_sha256: String,
    #[serde(default)]
    combined_rootxz_sha256: String,
    #[serde(default)]
    combined_squashfs_sha256: String,
    #[serde(default, rename = "combined_disk1-img_sha256")]
    combined_disk1: String,
    #[serde(default, rename = "combined_disk-kvm-img_sha256")]
    combined_disk_kvm: String,
    #[serde(default, rename = "combined_uefi1-img_sha256")]
    combined_uefi1: String,
}

/// What the servers call this machine's architecture.
fn architectures() -> &'static [&'static str] {
    match std::env::consts::ARCH {
        "aarch64" => &["arm64", "aarch64"],
        _ => &["amd64", "x86_64"],
    }
}

/// A way to take a version: its metadata, its root, the fingerprint, the kind. The better one first.
fn ways(version: &Version) -> Vec<(&Item, Option<&Item>, &str, InstanceKind)> {
    let item = |names: &[&str]| version.items.values().find(|i| names.contains(&i.ftype.as_str()));
    let mut found = vec![];
    if let Some(meta) = item(&["incus.tar.xz", "lxd.tar.xz"]) {
        let rootxz = match meta.combined_rootxz_sha256.as_str() {
            "" => meta.combined_sha256.as_str(),
            hash => hash,
        };
        for (name, hash, kind) in [
            ("squashfs", meta.combined_squashfs_sha256.as_str(), InstanceKind::Container),
            ("root.tar.xz", rootxz, InstanceKind::Container),
            ("disk-kvm.img", meta.combined_disk_kvm.as_str(), InstanceKind::VirtualMachine),
            ("disk1.img", meta.combined_disk1.as_str(), InstanceKind::VirtualMachine),
            ("uefi1.img", meta.combined_uefi1.as_str(), InstanceKind::VirtualMachine),
        ] {
            if let (Some(root), false) = (item(&[name]), hash.is_empty()) {
                found.push((meta, Some(root), hash, kind));
            }
        }
    }
    if let Some(all) = item(&["incus_combined.tar.gz", "lxd_combined.tar.gz"])
        && !all.sha256.is_empty()
    {
        found.push((all, None, all.sha256.as_str(), InstanceKind::Container));
    }
    found
}

fn named(product: &Product, reference: &str) -> bool {
    product.aliases.split(',').map(str::trim).filter(|a| !a.is_empty()).any(|alias| {
        reference == alias
            || reference.strip_prefix(alias).and_then(|r| r.strip_prefix('/')) == Some(&product.arch)
    })
}

/// The newest that has the name, or the one with the fingerprint.
fn choose(all: &Products, reference: &str, kind: Option<InstanceKind>) -> Result<Option<RemoteImage>> {
    let here = || all.products.values().filter(|p| architectures().contains(&p.arch.as_str()));
    let wanted = |k: InstanceKind| kind.is_none_or(|wanted| wanted == k);
    let mut newest: Option<(&str, RemoteImage)> = None;
    for product in here().filter(|p| named(p, reference)) {
        for (serial, version) in product.versions.iter().rev() {
            let mut found = ways(version).into_iter().filter(|w| wanted(w.3));
            let Some(way) = found.next() else { continue };
            if newest.as_ref().is_none_or(|(s, _)| *s < serial.as_str()) {
                newest = Some((serial, image(product, serial, version, way, true)?));
            }
            break;
        }
    }
    if let Some((_, image)) = newest {
        return Ok(Some(image));
    }
    let reference = reference.to_ascii_lowercase();
    if reference.len() < 12 || !reference.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Ok(None);
    }
    for product in here() {
        for (serial, version) in &product.versions {
            for way in ways(version).into_iter().filter(|w| wanted(w.3)) {
                if way.2.to_ascii_lowercase().starts_with(&reference) {
                    return image(product, serial, version, way, false).map(Some);
                }
            }
        }
    }
    Ok(None)
}

fn image(
    product: &Product,
    serial: &str,
    version: &Version,
    (meta, root, hash, kind): (&Item, Option<&Item>, &str, InstanceKind),
    by_alias: bool,
) -> Result<RemoteImage> {
    let label = if version.label.is_empty() { String::new() } else { format!(" ({})", version.label) };
    let description = format!("{} {} {}{label} ({serial})", product.os, product.release_title, product.arch);
    let kind_of_root = root.map_or("tar.gz", |r| r.ftype.as_str());
    let mut properties: Config = [
        ("os", product.os.as_str()),
        ("release", &product.release),
        ("version", &product.version),
        ("architecture", &product.arch),
        ("label", &version.label),
        ("serial", serial),
        ("description", &description),
        ("variant", &product.variant),
        ("type", kind_of_root),
    ]
    .map(|(k, v)| (k.to_owned(), v.to_owned()))
    .into();
    properties.extend(product.requirements.iter().map(|(k, v)| (format!("requirements.{k}"), v.clone())));
    properties.retain(|_, v| !v.is_empty());
    let first = if root.is_some() { ImagePart::Metadata } else { ImagePart::Unified };
    let second = if kind == InstanceKind::Container { ImagePart::Rootfs } else { ImagePart::Disk };
    let files = [Some((first, meta)), root.map(|r| (second, r))];
    let files = files.into_iter().flatten().map(|(part, item)| {
        checked_path(&item.path)?;
        if item.size == 0 {
            return Err(nonsense("list", "a file without a size"));
        }
        Ok((part, item.path.clone(), checked_fingerprint(&item.sha256)?, item.size))
    });
    let files: Vec<_> = files.collect::<Result<_>>()?;
    let end = product.support_eol.parse::<jiff::civil::Date>().ok();
    Ok(RemoteImage {
        fingerprint: checked_fingerprint(hash)?,
        kind,
        size: files.iter().fold(0, |sum, f| sum.saturating_add(f.3)),
        filename: checked_name(&meta.path),
        properties: checked_properties(properties)?,
        expires_at: end.and_then(|d| d.to_zoned(jiff::tz::TimeZone::UTC).ok()).map(|z| z.timestamp()),
        by_alias,
        files,
    })
}

/// Files lie below the server, wherever its list comes from.
fn checked_path(path: &str) -> Result<()> {
    let plain = |c: &str| {
        !c.is_empty()
            && c != "."
            && c != ".."
            && c.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-+~:%@,=".contains(&b))
    };
    match path.len() <= 1024 && path.split('/').all(plain) {
        true => Ok(()),
        false => Err(nonsense("list", format!("{path:?} is no path of a file"))),
    }
}

pub(super) async fn find(https: &Https, source: &RemoteSource) -> Result<RemoteImage> {
    let index = https.document("/streams/v1/index.json", INDEX).await?;
    let index: Index = serde_json::from_slice(&index).map_err(|e| nonsense("index", e))?;
    let useful = index.index.values().filter(|e| e.datatype == "image-downloads" && !e.products.is_empty());
    for entry in useful.take(FILES) {
        checked_path(&entry.path)?;
        let all = https.document(&format!("/{}", entry.path), PRODUCTS).await?;
        let reference = source.reference.clone();
        let kind = source.from.kind;
        // Megabytes of JSON: not on the runtime's threads.
        let found = tokio::task::spawn_blocking(move || {
            let all: Products = serde_json::from_slice(&all).map_err(|e| nonsense("list", e))?;
            choose(&all, &reference, kind)
        });
        let found = found.await.map_err(|e| Error::internal("reading a list of images ended", e))?;
        if let Some(image) = found? {
            return Ok(image);
        }
    }
    let kind = source.from.kind.map(|k| format!(" for a {k}")).unwrap_or_default();
    Err(Error::not_found(format!(
        "the image server has no image {:?}{kind} of this architecture",
        source.reference
    )))
}

pub(super) async fn fetch(https: &Https, image: &RemoteImage, to: &dyn Parts) -> Result<Vec<ImagePart>> {
    let mut count = Count::new(image.size, to);
    let mut parts = vec![];
    for (part, path, hash, size) in &image.files {
        let (_, mut body) = https.get(&format!("/{path}")).await?;
        let mut sink = Sink::open(to, *part).await?;
        while let Some(data) = body.next().await? {
            count.add(data.len())?;
            sink.write(&data).await?;
        }
        let (came, got) = sink.end().await?;
        if came != *size {
            let text = format!("the image server sent {came} bytes of {path:?} and announced {size}");
            return Err(Error::invalid("fingerprint", text));
        }
        if got != *hash {
            return Err(differs(&got, hash));
        }
        parts.push(*part);
    }
    Ok(parts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn of(digit: char) -> String {
        digit.to_string().repeat(64)
    }

    fn version() -> Value {
        json!({"label": "release", "items": {
            "incus.tar.xz": {"ftype": "incus.tar.xz", "path": "a/meta.tar.xz", "sha256": of('1'), "size": 10,
                "combined_squashfs_sha256": of('a'), "combined_disk-kvm-img_sha256": of('b'),
                "combined_rootxz_sha256": of('c')},
            "squashfs": {"ftype": "squashfs", "path": "a/root.squashfs", "sha256": of('2'), "size": 20},
            "disk.qcow2": {"ftype": "disk-kvm.img", "path": "a/disk.qcow2", "sha256": of('3'), "size": 30},
        }})
    }

    fn products(change: impl FnOnce(&mut Value)) -> Products {
        let mut all = json!({"products": {
            "debian:12:amd64": {"aliases": "debian/12,debian/bookworm", "arch": "amd64", "os": "Debian", "release": "bookworm",
                "release_title": "bookworm", "support_eol": "2028-06-30", "requirements": {"secureboot": "false"},
                "versions": {"20260101_05:24": version(), "20260201_05:24": version()}},
            "debian:12:arm64": {"aliases": "debian/12", "arch": "arm64", "versions": {"20270101": version()}},
        }});
        change(&mut all);
        serde_json::from_value(all).unwrap()
    }

    #[test]
    fn the_newest_of_this_architecture_is_chosen() {
        let all = products(|_| {});
        for name in ["debian/12", "debian/bookworm", "debian/12/amd64"] {
            let image = choose(&all, name, Some(InstanceKind::Container)).unwrap().expect(name);
            assert_eq!((image.fingerprint.as_str(), image.size), (&*of('a'), 30));
            assert_eq!(image.properties["serial"], "20260201_05:24");
            assert_eq!(image.properties["requirements.secureboot"], "false");
            assert_eq!(image.files[1].0, ImagePart::Rootfs);
            assert!(image.by_alias && image.expires_at.is_some());
        }
        let machine = choose(&all, "debian/12", Some(InstanceKind::VirtualMachine)).unwrap().unwrap();
        assert_eq!((machine.fingerprint, machine.files[1].0), (of('b'), ImagePart::Disk));
        let by_hash = choose(&all, &"b".repeat(12), None).unwrap().unwrap();
        assert!(by_hash.kind == InstanceKind::VirtualMachine && !by_hash.by_alias);
        for missing in ["debian/13", "debian", "", "abc", &"d".repeat(20)] {
            assert!(choose(&all, missing, None).unwrap().is_none(), "{missing}");
        }
    }

    #[test]
    fn lists_that_lead_elsewhere_are_refused() {
        let path = "/products/debian:12:amd64/versions/20260201_05:24/items/squashfs";
        for (field, value) in [
            ("path", json!("../../etc/passwd")),
            ("path", json!("https://elsewhere/x")),
            ("path", json!("/x")),
            ("path", json!("a/../b")),
            ("path", json!("a b")),
            ("path", json!("a?b")),
            ("path", json!("")),
            ("sha256", json!("zz")),
            ("size", json!(0)),
        ] {
            let all = products(|v| v.pointer_mut(path).unwrap()[field] = value.clone());
            assert!(choose(&all, "debian/12", Some(InstanceKind::Container)).is_err(), "{field} {value}");
        }
    }
}
