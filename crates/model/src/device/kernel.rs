//! The kernel that a virtual machine is started with, in place of what its disks would boot: `kernel`.
//!
//! Its firmware gets the files when the machine starts and keeps none of them: afterwards they may change or go. So a volume
//! is used by the record that names it, not by the guest that was started with it.

use super::{DiskOrigin, Keys, other_keys::keys_of, plain_path};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Longest command line: what Linux takes on x86, without its last zero.
const LINE: usize = 2047;

/// A kernel, what it unpacks first, and its command line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelDevice {
    /// The kernel: a volume with one on it from its first byte, or a file of the host.
    pub kernel: DiskOrigin,
    /// Its initial file system, the same way.
    pub initrd: Option<DiskOrigin>,
    /// Command line.
    pub cmdline: Option<String>,
}

impl KernelDevice {
    pub(super) fn parse(keys: &Keys<'_>) -> Result<Self> {
        keys.known(&keys_of("kernel"))?;
        let kernel = keys.demand("source", "it needs the kernel: a custom volume of a pool, or a path")?;
        let initrd = keys.get("initrd");
        if let (None, Some(_)) = (initrd, keys.get("initrd.pool")) {
            return Err(Error::invalid(keys.field("initrd.pool"), "there is no initrd; name its volume"));
        }
        let kernel = origin(keys, ("source", "pool"), kernel, keys.get("pool"))?;
        let pool = keys.get("initrd.pool").or(keys.get("pool"));
        let initrd = initrd.map(|i| origin(keys, ("initrd", "initrd.pool"), i, pool)).transpose()?;
        let cmdline = keys.get("cmdline").map(str::to_owned);
        if cmdline.as_ref().is_some_and(|c| c.len() > LINE || c.chars().any(char::is_control)) {
            let text = format!("a command line is one line of at most {LINE} bytes");
            return Err(Error::invalid(keys.field("cmdline"), text));
        }
        Ok(Self { kernel, initrd, cmdline })
    }

    /// The files, with the keys that name them.
    pub fn files(&self) -> impl Iterator<Item = (&'static str, &DiskOrigin)> {
        [("source", &self.kernel)].into_iter().chain(self.initrd.as_ref().map(|i| ("initrd", i)))
    }
}

fn origin(
    keys: &Keys<'_>,
    (key, pool_key): (&str, &str),
    source: &str,
    pool: Option<&str>,
) -> Result<DiskOrigin> {
    match pool {
        _ if source.starts_with('/') => Ok(DiskOrigin::Host { path: plain_path(&keys.field(key), source)? }),
        Some(pool) => Ok(DiskOrigin::Volume { pool: pool.to_owned(), volume: source.to_owned() }),
        None => Err(Error::invalid(keys.field(pool_key), "a custom volume needs the name of its pool")),
    }
}

/// Do the keys of such a device name this volume?
pub fn kernel_names(keys: &BTreeMap<String, String>, pool: &str, volume: &str) -> bool {
    let is = |key: &str, value: &str| keys.get(key).is_some_and(|v| v == value);
    is("source", volume) && is("pool", pool)
        || is("initrd", volume) && keys.get("initrd.pool").or(keys.get("pool")).is_some_and(|p| p == pool)
}

/// Lets the keys of such a device that name one volume (by pool and name) name another; answers whether they did.
pub fn kernel_follow(keys: &mut BTreeMap<String, String>, old: (&str, &str), new: (&str, &str)) -> bool {
    let pool_of = |key: &str| keys.get(key).cloned();
    let (pool, of_initrd) = (pool_of("pool"), pool_of("initrd.pool").or_else(|| pool_of("pool")));
    let is = |key: &str, pool: &Option<String>| {
        keys.get(key).is_some_and(|v| v == old.1) && pool.as_deref() == Some(old.0)
    };
    let (kernel, initrd) = (is("source", &pool), is("initrd", &of_initrd));
    if kernel {
        keys.insert("pool".into(), new.0.into());
        keys.insert("source".into(), new.1.into());
    }
    if initrd {
        keys.insert("initrd".into(), new.1.into());
    }
    if (kernel || initrd) && keys.contains_key("initrd") {
        // Where it was, or is now, whatever became of the kernel.
        let pool = if initrd { Some(new.0.to_owned()) } else { of_initrd };
        match pool {
            Some(pool) if keys.get("pool") != Some(&pool) => drop(keys.insert("initrd.pool".into(), pool)),
            _ => drop(keys.remove("initrd.pool")),
        }
    }
    kernel || initrd
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;

    fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()
    }

    fn parse(pairs: &[(&str, &str)]) -> Result<KernelDevice> {
        let mut keys = map(pairs);
        keys.insert("type".into(), "kernel".into());
        match Device::parse("boot", &keys)? {
            Device::Kernel(kernel) => Ok(kernel),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn volumes_and_paths() {
        let volume =
            |pool: &str, volume: &str| DiskOrigin::Volume { pool: pool.into(), volume: volume.into() };
        let whole = [("pool", "p"), ("source", "k"), ("initrd", "i"), ("cmdline", "console=ttyS0 a,b")];
        let kernel = parse(&whole).unwrap();
        assert_eq!((kernel.kernel, kernel.initrd), (volume("p", "k"), Some(volume("p", "i"))));
        let kernel = parse(&[("source", "/boot/k"), ("initrd", "i"), ("initrd.pool", "q")]).unwrap();
        assert_eq!(kernel.kernel, DiskOrigin::Host { path: "/boot/k".into() });
        assert_eq!(kernel.initrd, Some(volume("q", "i")));
        for (pairs, field) in [
            (&[("pool", "p")][..], "source"),
            (&[("source", "k")], "pool"),
            (&[("source", "/k"), ("initrd", "i")], "initrd.pool"),
            (&[("source", "/k"), ("initrd.pool", "p")], "initrd.pool"),
            (&[("source", "/a/../k")], "source"),
            (&[("source", "/k"), ("cmdline", "a\nb")], "cmdline"),
            (&[("source", "/k"), ("cmdline", &"x".repeat(2048))], "cmdline"),
            (&[("source", "/k"), ("append", "x")], "append"),
        ] {
            assert_eq!(parse(pairs).unwrap_err().field, Some(format!("devices.boot.{field}")), "{pairs:?}");
        }
    }

    #[test]
    fn names_follow_their_volumes() {
        let whole = [("type", "kernel"), ("pool", "p"), ("source", "k"), ("initrd", "i")];
        let keys = map(&whole);
        assert!(kernel_names(&keys, "p", "k") && kernel_names(&keys, "p", "i"));
        assert!(!kernel_names(&keys, "q", "k") && !kernel_names(&keys, "p", "x"));
        for (old, new, wanted) in [
            (("p", "k"), ("p", "n"), &[("pool", "p"), ("source", "n"), ("initrd", "i")][..]),
            (("p", "i"), ("p", "n"), &[("pool", "p"), ("source", "k"), ("initrd", "n")]),
            (
                ("p", "k"),
                ("q", "k"),
                &[("pool", "q"), ("source", "k"), ("initrd", "i"), ("initrd.pool", "p")],
            ),
            (
                ("p", "i"),
                ("q", "i"),
                &[("pool", "p"), ("source", "k"), ("initrd", "i"), ("initrd.pool", "q")],
            ),
        ] {
            let mut now = keys.clone();
            assert!(kernel_follow(&mut now, old, new));
            let mut wanted = map(wanted);
            wanted.insert("type".into(), "kernel".into());
            assert_eq!(now, wanted);
            // And back.
            assert!(kernel_follow(&mut now, new, old));
            assert_eq!(now, keys);
        }
        let mut now = keys.clone();
        assert!(!kernel_follow(&mut now, ("q", "k"), ("q", "n")) && now == keys);
    }
}
