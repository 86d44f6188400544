//! What the pool and its volumes are, in texts that others make: for whoever has nothing but the pool.
//!
//! ```text
//! POOL/descriptions/        0700
//!   pool.json         0400  of the pool itself
//!   <volume>.json     0400  of a volume
//! ```
//! They lie beside the states rather than in them, because a restore puts another state in a volume's place. Each changes by
//! one rename, and is on disk before its name is. One without a volume is removed when the pool is opened.

use crate::{Descriptions, FilePool, files::blocking};
use async_trait::async_trait;
use karst_model::{Result, VolumeId};
use std::{
    fs::File,
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

/// Where they lie in a pool.
pub(crate) const DIRECTORY: &str = "descriptions";
/// Up to so many are synced one by one, more with the whole file system.
const FEW: usize = 8;

fn place(root: &Path, volume: Option<VolumeId>) -> PathBuf {
    let name = volume.map_or_else(|| "pool".to_owned(), |id| id.to_string());
    root.join(DIRECTORY).join(name + ".json")
}

fn absent(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if !absent(&e) => Err(e),
        _ => Ok(()),
    }
}

/// The volume is gone.
pub(crate) fn forget(root: &Path, volume: VolumeId) -> io::Result<()> {
    remove(&place(root, Some(volume)))
}

/// Removes what is of no volume, and what was in the making.
pub(crate) fn sweep(root: &Path) -> Result<()> {
    let entries = match std::fs::read_dir(root.join(DIRECTORY)) {
        Err(e) if absent(&e) => return Ok(()),
        other => other?,
    };
    for entry in entries.flatten() {
        let path = entry.path();
        let name = entry.file_name();
        let of = name.to_str().and_then(|n| n.strip_suffix(".json"));
        if of.is_none_or(|of| of != "pool" && !root.join("volumes").join(of).exists()) {
            remove(&path)?;
        }
    }
    Ok(())
}

/// The text of a file that anybody may have put there: a plain file, no link, of at most `most` bytes.
fn text(path: &Path, most: usize) -> io::Result<Option<String>> {
    // Not to wait for a writer of a pipe.
    let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
    let file = match File::options().read(true).custom_flags(flags.bits() as i32).open(path) {
        Err(e) if absent(&e) || e.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error()) => {
            return Ok(None);
        }
        other => other?,
    };
    if !file.metadata()?.is_file() {
        return Ok(None);
    }
    let mut bytes = vec![];
    file.take(most as u64 + 1).read_to_end(&mut bytes)?;
    Ok(if bytes.len() > most { None } else { String::from_utf8(bytes).ok() })
}

/// What is said of the pool in the directory `root`, which need not be opened for that.
///
/// # Errors
/// The system's.
pub fn pool_description(root: &Path, most: usize) -> Result<Option<String>> {
    Ok(text(&place(root, None), most)?)
}

/// Writes a file that is not in its place yet.
fn write(path: &Path, text: &str) -> io::Result<File> {
    // A crash may have left one, which is of no use.
    remove(path)?;
    let mut file = File::options().write(true).create_new(true).mode(0o400).open(path)?;
    file.write_all(text.as_bytes())?;
    Ok(file)
}

fn describe(root: &Path, all: Vec<(Option<VolumeId>, String)>) -> io::Result<()> {
    let mut fresh = vec![];
    for (volume, said) in all {
        let at = place(root, volume);
        let known = volume.is_none_or(|id| root.join("volumes").join(id.to_string()).exists());
        if !known || text(&at, said.len())?.as_ref() == Some(&said) {
            continue;
        }
        if fresh.is_empty() {
            match std::fs::DirBuilder::new().mode(0o700).create(root.join(DIRECTORY)) {
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
                _ => {}
            }
        }
        let new = at.with_extension("new");
        fresh.push((write(&new, &said)?, new, at));
    }
    if fresh.is_empty() {
        return Ok(());
    }
    let directory = File::open(root.join(DIRECTORY))?;
    if fresh.len() > FEW {
        rustix::fs::syncfs(&directory)?;
    } else {
        fresh.iter().try_for_each(|(file, _, _)| file.sync_data())?;
    }
    fresh.iter().try_for_each(|(_, new, at)| std::fs::rename(new, at))?;
    directory.sync_all()
}

#[async_trait]
impl Descriptions for FilePool {
    async fn describe(&self, own: Option<String>, volumes: Vec<(VolumeId, String)>) -> Result<()> {
        let root = self.root.clone();
        blocking(move || {
            let own = own.map(|text| (None, text)).into_iter();
            let all = own.chain(volumes.into_iter().map(|(id, text)| (Some(id), text)));
            Ok(describe(&root, all.collect())?)
        })
        .await
    }

    async fn description(&self, volume: Option<VolumeId>, most: usize) -> Result<Option<String>> {
        let root = self.root.clone();
        blocking(move || Ok(text(&place(&root, volume), most)?)).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn what_is_not_ours_is_not_read_and_what_is_of_nothing_goes() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        let id = |n: u128| VolumeId(uuid::Uuid::from_u128(n));
        std::fs::create_dir_all(root.join("volumes").join(id(1).to_string())).unwrap();
        describe(root, vec![(Some(id(1)), "one".into()), (Some(id(2)), "two".into())]).unwrap();
        assert_eq!(text(&place(root, Some(id(1))), 10).unwrap().as_deref(), Some("one"));
        assert_eq!(text(&place(root, Some(id(2))), 10).unwrap(), None);
        let mode = |path: PathBuf| std::fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        assert_eq!((mode(place(root, Some(id(1)))), mode(root.join(DIRECTORY))), (0o400, 0o700));
        // A write that was broken off is no hindrance, and not there.
        std::fs::write(place(root, Some(id(1))).with_extension("new"), "half").unwrap();
        describe(root, vec![(None, "pool".into()), (Some(id(1)), "again".into())]).unwrap();
        assert_eq!(text(&place(root, Some(id(1))), 10).unwrap().as_deref(), Some("again"));
        assert_eq!(pool_description(root, 10).unwrap().as_deref(), Some("pool"));
        // Links, directories, pipes and what is no text are none.
        let secret = root.join("secret");
        std::fs::write(&secret, "secret").unwrap();
        symlink(&secret, place(root, Some(id(3)))).unwrap();
        std::fs::create_dir(place(root, Some(id(4)))).unwrap();
        let fifo = rustix::fs::FileType::Fifo;
        rustix::fs::mknodat(rustix::fs::CWD, place(root, Some(id(5))), fifo, 0o600.into(), 0).unwrap();
        std::fs::write(place(root, Some(id(6))), [0xff, 0xfe]).unwrap();
        for n in 3..=6 {
            assert_eq!(text(&place(root, Some(id(n))), 100).unwrap(), None, "{n}");
        }
        std::fs::remove_dir(place(root, Some(id(4)))).unwrap();
        std::fs::write(root.join(DIRECTORY).join("x.new"), "").unwrap();
        sweep(root).unwrap();
        let mut left: Vec<_> =
            std::fs::read_dir(root.join(DIRECTORY)).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, [format!("{}.json", id(1)).as_str(), "pool.json"]);
    }
}
