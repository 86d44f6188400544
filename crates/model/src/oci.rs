//! Images of the OCI as their documents say (image-spec 1.1, and Docker's manifest 2.2): indexes, manifests, digests. All of
//! them are foreign.

use crate::{Error, Result, image::machine_name};
use serde::{Deserialize, de::DeserializeOwned};
use std::collections::BTreeMap;

/// Longest document.
pub const DOCUMENT: u64 = 4 << 20;
const MOST_LAYERS: usize = 512;

/// What an index or manifest refers to.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What it is.
    #[serde(default)]
    pub media_type: String,
    /// `sha256:…`
    pub digest: String,
    /// Bytes.
    pub size: u64,
    /// For what, in an index.
    #[serde(default)]
    pub platform: Option<Platform>,
    /// Remarks.
    #[serde(default)]
    pub annotations: Option<BTreeMap<String, String>>,
}

/// For what an image is made.
#[derive(Debug, Clone, Deserialize)]
pub struct Platform {
    /// `amd64`, in Go's words.
    #[serde(default)]
    pub architecture: String,
    /// `linux`.
    #[serde(default)]
    pub os: String,
}

#[derive(Deserialize)]
struct Index {
    #[serde(default)]
    manifests: Vec<Descriptor>,
}

/// A manifest.
#[derive(Debug, Clone, Deserialize)]
pub struct Manifest {
    /// Its configuration.
    pub config: Descriptor,
    /// Its layers, the lowest first.
    pub layers: Vec<Descriptor>,
}

/// The part of a digest behind `sha256:`.
///
/// # Errors
/// Invalid for any other kind.
pub fn digest<'a>(field: &str, text: &'a str) -> Result<&'a str> {
    let hex = text.strip_prefix("sha256:").unwrap_or_default();
    match hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) {
        true => Ok(hex),
        false => {
            let shown: String = text.chars().take(80).collect();
            Err(Error::invalid(field, format!("{shown:?} is no digest by SHA-256")))
        }
    }
}

/// Parses a manifest.
///
/// # Errors
/// Invalid: no manifest, or with layers that cannot be used.
pub fn manifest(field: &str, text: &[u8]) -> Result<Manifest> {
    let manifest: Manifest = parse(field, "manifest", text)?;
    if manifest.layers.is_empty() || manifest.layers.len() > MOST_LAYERS {
        let text = format!("the image has {} layers; 1 to {MOST_LAYERS} are possible", manifest.layers.len());
        return Err(Error::invalid(field, text));
    }
    for layer in &manifest.layers {
        let kind = layer.media_type.as_str();
        if !kind.contains("tar") || kind.contains("encrypted") || kind.contains("foreign") {
            let shown: String = kind.chars().take(80).collect();
            return Err(Error::invalid(
                field,
                format!("a layer is of type {shown:?}, which is no archive of files"),
            ));
        }
        digest(field, &layer.digest)?;
    }
    digest(field, &manifest.config.digest)?;
    Ok(manifest)
}

/// Is what this describes an index?
pub fn is_index(media_type: &str) -> bool {
    media_type.contains("image.index") || media_type.contains("manifest.list")
}

/// The manifest of an index that is for this machine.
///
/// # Errors
/// Invalid, naming what there is.
pub fn choose(field: &str, text: &[u8]) -> Result<Descriptor> {
    let index: Index = parse(field, "index", text)?;
    let known = |d: &&Descriptor| d.platform.as_ref().is_none_or(|p| p.os != "unknown");
    let all: Vec<&Descriptor> = index.manifests.iter().take(1024).filter(known).collect();
    let fits = |d: &&&Descriptor| {
        let platform = d.platform.as_ref();
        platform.is_some_and(|p| p.os == "linux" && machine_name(&p.architecture) == std::env::consts::ARCH)
    };
    let found = match all.as_slice() {
        [only] if only.platform.is_none() => Some(*only),
        all => all.iter().find(fits).copied(),
    };
    found.cloned().ok_or_else(|| {
        let there: Vec<String> = all
            .iter()
            .filter_map(|d| d.platform.as_ref())
            .map(|p| format!("{}/{}", p.os, p.architecture).chars().take(40).collect())
            .take(16)
            .collect();
        let there = if there.is_empty() { "none that is named".to_owned() } else { there.join(", ") };
        Error::invalid(
            field,
            format!("no image for linux on {} is there; there are {there}", std::env::consts::ARCH),
        )
    })
}

/// Reads a document.
///
/// # Errors
/// Invalid.
pub fn parse<T: DeserializeOwned>(field: &str, what: &str, text: &[u8]) -> Result<T> {
    serde_json::from_slice(text)
        .map_err(|e| Error::invalid(field, format!("the image's {what} cannot be read")).with_context(e))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    fn index(platforms: &[(&str, &str)]) -> Vec<u8> {
        let one = |(n, (os, arch)): (usize, &(&str, &str))| serde_json::json!({"digest": format!("sha256:{n}"), "size": n, "platform": {"os": os, "architecture": arch}});
        let manifests: Vec<_> = platforms.iter().enumerate().map(one).collect();
        serde_json::to_vec(&serde_json::json!({"manifests": manifests})).unwrap()
    }

    #[test]
    fn the_manifest_for_this_machine_is_chosen() {
        let here = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
        let text = index(&[("linux", "s390x"), ("unknown", "unknown"), ("windows", here), ("linux", here)]);
        assert_eq!(choose("x", &text).unwrap().digest, "sha256:3");
        let e = choose("x", &index(&[("linux", "s390x"), ("unknown", "unknown")])).unwrap_err();
        assert!(e.message.contains("linux/s390x") && !e.message.contains("unknown"), "{e}");
        assert!(choose("x", b"{\"manifests\": []}").is_err());
        assert!(choose("x", b"[]").is_err());
        let only = br#"{"manifests": [{"digest": "sha256:a", "size": 1}]}"#;
        assert_eq!(choose("x", only).unwrap().digest, "sha256:a");
    }

    #[test]
    fn manifests_are_checked() {
        let layer = |kind: &str, digest: &str| {
            let layer = serde_json::json!({"mediaType": kind, "digest": digest, "size": 1});
            let config = serde_json::json!({"digest": format!("sha256:{HEX}"), "size": 1});
            serde_json::to_vec(&serde_json::json!({"config": config, "layers": [layer]})).unwrap()
        };
        let good = format!("sha256:{HEX}");
        let tar = "application/vnd.oci.image.layer.v1.tar+gzip";
        assert_eq!(manifest("x", &layer(tar, &good)).unwrap().layers.len(), 1);
        manifest("x", &layer("application/vnd.docker.image.rootfs.diff.tar.gzip", &good)).unwrap();
        let upper = good.to_uppercase();
        for (kind, digest) in [
            (tar, "sha256:../../etc"),
            (tar, upper.as_str()),
            (tar, "md5:aa"),
            ("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", &good),
            ("application/json", &good),
        ] {
            assert!(manifest("x", &layer(kind, digest)).is_err(), "{kind} {digest}");
        }
        assert!(manifest("x", br#"{"config": {"digest": "x", "size": 1}, "layers": []}"#).is_err());
    }
}
