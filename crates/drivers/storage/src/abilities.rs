//! What the file system of a pool can, tried in an empty directory of it: nothing is taken from its name, since an export, a mount option
//! or a kernel can take away what others of that name have.

use crate::states::keeps_no_owners;
use karst_host::mountns::{MountOptions, detached, open_path, user_namespace};
use karst_model::{Error, Result, storage::Abilities};
use rustix::fs::{OFlags, XattrFlags};
use std::{
    fs::File,
    io,
    os::{
        fd::AsFd,
        unix::fs::{FileExt, MetadataExt, OpenOptionsExt, lchown},
    },
    path::Path,
};

/// Somebody who owns nothing else.
const SOMEBODY: u32 = 1_900_200_000;

/// Tries all but layers and limits, which are tried elsewhere. What cannot be tried on a full disk is taken to be missing, but for what
/// decides what the pool may hold: that takes no space.
pub(crate) fn find(trial: &Path, layers: bool, limits: bool) -> Result<Abilities> {
    let owners = owned(trial)?;
    // Of no use where nobody else could own anything either.
    let mapped = owners && maps(trial)?;
    let known = Abilities { owners, mapped, layers, limits, ..Abilities::default() };
    Ok(files(trial, known).unwrap_or_else(|e| {
        tracing::warn!(error = %e, "not all could be tried that the file system of a pool may be able to do");
        known
    }))
}

fn files(trial: &Path, known: Abilities) -> io::Result<Abilities> {
    let (file, copy) = (trial.join("file"), trial.join("copy"));
    let made = File::options().read(true).write(true).create_new(true).mode(0o600).open(&file)?;
    made.write_all_at(&[1; 4096], 1 << 20)?;
    let holes = made.metadata()?.blocks() * 512 < 1 << 19;
    let links = std::fs::hard_link(&file, trial.join("link")).is_ok();
    let target = File::options().write(true).create_new(true).open(&copy)?;
    let clones = karst_host::fs::reflink(&made, &target).unwrap_or(false);
    let past = File::options().read(true).custom_flags(OFlags::DIRECT.bits() as i32).open(&file);
    // Some take the flag and refuse what is done with it.
    let direct = past.is_ok_and(|past| {
        let mut aligned = Aligned([0; 4096]);
        rustix::io::pread(&past, &mut aligned.0, 0).is_ok()
    });
    let attributes = rustix::fs::setxattr(&file, "user.karst", b"1", XattrFlags::empty()).is_ok();
    Ok(Abilities { clones, links, holes, direct, attributes, ..known })
}

#[repr(align(4096))]
struct Aligned([u8; 4096]);

/// Does what is there keep the owner that it is given?
fn owned(place: &Path) -> Result<bool> {
    let kept = |id: u32| -> Result<bool> {
        match lchown(place, Some(id), Some(id)) {
            Err(e) if keeps_no_owners(&e) => return Ok(false),
            other => other?,
        }
        let found = std::fs::symlink_metadata(place)?;
        Ok((found.uid(), found.gid()) == (id, id))
    };
    Ok(kept(SOMEBODY)? && kept(0)?)
}

/// What fails before the file system is asked says nothing of it: then the pool is not opened, rather than taken for one whose trees
/// are to be moved on disk.
fn maps(directory: &Path) -> Result<bool> {
    let ids = user_namespace(SOMEBODY, 65_536)?;
    let place = open_path(directory)?;
    let tried = detached(place.as_fd(), MountOptions::default(), Some(ids.as_fd()));
    if let Err(e) = &tried {
        tracing::debug!(error = %e, context = e.context.as_deref(), "no mounts with other owners here");
    }
    Ok(tried.is_ok())
}

/// Why a pool takes no trees.
pub(crate) fn no_owners() -> Error {
    Error::unsupported(
        "the file system of this pool keeps no owners of files (FAT, or an NFS export with root_squash), so it takes disks of virtual \
         machines and ISO images only; export it with no_root_squash, or use another pool for containers and volumes of files",
    )
}

/// For what only looks.
pub(crate) fn unknown(root: &Path) -> io::Result<Abilities> {
    // It has to be reachable, and that is all.
    std::fs::metadata(root).map(|_| Abilities { owners: true, ..Abilities::default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tried(below: &Path) -> Abilities {
        let dir = tempfile::tempdir_in(below).unwrap();
        find(dir.path(), false, false).unwrap()
    }

    #[test]
    fn file_systems_of_this_machine_are_told_apart() {
        if !crate::backends::root() {
            return;
        }
        // In memory: whatever else the kernel's can, these it has always had.
        let memory = tried(Path::new("/dev/shm"));
        assert!(memory.owners && memory.links && memory.holes && !memory.clones, "{memory:?}");
        let here = tried(&std::env::temp_dir());
        assert!(here.owners && here.links, "{here:?}");
    }
}
