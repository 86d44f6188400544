//! Images of lab guests: made by tests/lab/image, kept by the content of their recipe, there as a whole or not at all.

use super::{Result, lab_dir, mkdir, output};
use crate::root;
use std::{
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// The directory with `disk.qcow2`, `vmlinuz`, `initrd.img`, `key` and `known_hosts` of a variant.
pub fn ensure(variant: &str) -> Result<PathBuf> {
    if !variant.chars().all(|c| c.is_ascii_alphanumeric() || c == '-') {
        return Err(format!("{variant:?} is no name of a variant"));
    }
    let script = root().join("tests/lab/image");
    let mut hash = DefaultHasher::new();
    let text = |file: &Path| fs::read_to_string(file).map_err(|e| format!("{}: {e}", file.display()));
    text(&script)?.hash(&mut hash);
    // Of the list of dependencies only what the recipe reads of it: what Karst needs at run time.
    let list = text(&root().join("scripts/install-dependencies"))?;
    list.split_once("runtime=(").and_then(|(_, l)| l.split_once(')')).map(|(l, _)| l).hash(&mut hash);
    let images = lab_dir().join("images");
    let image = images.join(format!("{variant}-{:016x}", hash.finish()));
    if image.join("disk.qcow2").exists() {
        return Ok(image);
    }
    mkdir(&images)?;
    // One builder at a time; the lock goes with the process.
    let lock = fs::File::create(images.join(format!("{variant}.lock"))).map_err(|e| e.to_string())?;
    lock.lock().map_err(|e| format!("locking {variant}: {e}"))?;
    if image.join("disk.qcow2").exists() {
        return Ok(image);
    }
    let work = images.join(format!("{variant}.work"));
    let _ = fs::remove_dir_all(&work); // what an interrupted build left, if anything
    mkdir(&work)?;
    eprintln!("lab: making the image {variant}; minutes, once ({}/build.log)", work.display());
    output("ssh-keygen", &["-q", "-t", "ed25519", "-N", "", "-C", "karst-lab", "-f", "key"], &work)?;
    let log = fs::File::create(work.join("build.log")).map_err(|e| e.to_string())?;
    let errors = log.try_clone().map_err(|e| e.to_string())?;
    let status = Command::new(&script)
        .arg(variant)
        .arg(&work)
        .arg(lab_dir().join("packages").join(variant))
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(errors)
        .status()
        .map_err(|e| format!("{}: {e}", script.display()))?;
    if !status.success() {
        return Err(format!("the image {variant} could not be made:\n{}", tail(&work.join("build.log"), 25)));
    }
    let host = fs::read_to_string(work.join("host.pub")).map_err(|e| format!("host key: {e}"))?;
    fs::write(work.join("known_hosts"), format!("lab {host}")).map_err(|e| e.to_string())?;
    fs::rename(&work, &image).map_err(|e| format!("{}: {e}", image.display()))?;
    drop_old(&images, variant, &image);
    Ok(image)
}

/// Earlier recipes' images go, unless a guest's overlay stands on them.
fn drop_old(images: &Path, variant: &str, keep: &Path) {
    let used = super::guest::images_in_use();
    for entry in fs::read_dir(images).into_iter().flatten().flatten() {
        let path = entry.path();
        let name = entry.file_name().to_string_lossy().into_owned();
        let of_this = name.strip_prefix(variant).and_then(|r| r.strip_prefix('-'));
        let is_key = of_this.is_some_and(|r| r.len() == 16 && r.chars().all(|c| c.is_ascii_hexdigit()));
        if is_key && path != keep && !used.contains(&path) {
            let _ = fs::remove_dir_all(path); // space only
        }
    }
}

/// The last lines of a file.
pub fn tail(file: &Path, lines: usize) -> String {
    let text = fs::read(file).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default();
    let all: Vec<_> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
