//! Layers of an image of the OCI: archives that are applied over each other, with whiteouts of what lies below.

use super::{Bounds, Found, Part, Unpacker, show};
use karst_model::Result;
use rustix::{
    fs::{AtFlags, Mode, OFlags, ResolveFlags},
    io::Errno,
};
use std::{
    collections::HashSet,
    fs::File,
    io::{self, Read},
    os::fd::OwnedFd,
    path::Path,
};

/// Layers of an image that are applied over each other.
pub struct Layers<'a> {
    out: OwnedFd,
    field: &'a str,
    bounds: Bounds,
    found: Found,
}

impl<'a> Layers<'a> {
    /// None yet.
    ///
    /// # Errors
    /// The directory cannot be used.
    pub fn new(out: &Path, field: &'a str, bounds: Bounds) -> Result<Self> {
        let out = rustix::fs::open(out, OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .map_err(io::Error::from)?;
        rustix::fs::mkdirat(&out, "tree", Mode::from(0o755)).map_err(io::Error::from)?;
        Ok(Self { out, field, bounds, found: Found::default() })
    }

    /// Applies the next one: an archive, compressed or not, with whiteouts of what lies below.
    ///
    /// # Errors
    /// As [`super::unpack`].
    pub fn apply(&mut self, input: impl Read) -> Result<()> {
        let tree = rustix::fs::openat(
            &self.out,
            "tree",
            OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC,
            Mode::empty(),
        );
        let tree = tree.map_err(io::Error::from)?;
        let mut w = Unpacker {
            root: &self.out,
            field: self.field,
            within: None,
            beside: None,
            bounds: self.bounds,
            found: std::mem::take(&mut self.found),
            dirs: vec![],
            parent: None,
            layer: Some(Layer { tree, seen: HashSet::new() }),
            machine: None,
        };
        w.archive(input, Part::Root)?;
        self.found = w.found;
        Ok(())
    }

    /// A file of the tree, at most 1 MiB of it.
    pub fn read(&self, path: &str) -> Option<Vec<u8>> {
        let tree =
            rustix::fs::openat(&self.out, "tree", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).ok()?;
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::openat2(&tree, path, flags, Mode::empty(), resolve).ok()?);
        let mut text = vec![];
        file.metadata().ok().filter(|m| m.is_file())?;
        file.take(1 << 20).read_to_end(&mut text).ok()?;
        Some(text)
    }

    /// Makes the directories at which a container's own file systems are mounted, where no layer brought them.
    ///
    /// # Errors
    /// Invalid when something else is there.
    pub fn complete(&self) -> Result<()> {
        for (name, mode) in
            [("dev", 0o755), ("etc", 0o755), ("proc", 0o755), ("run", 0o755), ("sys", 0o755), ("tmp", 0o1777)]
        {
            let path = format!("tree/{name}");
            match rustix::fs::mkdirat(&self.out, &path, Mode::from(mode)) {
                Ok(()) => {
                    // The mask of the process is not the image's.
                    rustix::fs::chmodat(&self.out, &path, Mode::from(mode), AtFlags::empty())
                        .map_err(io::Error::from)?;
                }
                Err(Errno::EXIST) => {}
                Err(e) => return Err(io::Error::from(e).into()),
            }
        }
        Ok(())
    }

    /// What was found in all of them.
    pub fn found(self) -> Found {
        self.found
    }
}

/// A layer that is being applied.
pub(super) struct Layer {
    pub(super) tree: OwnedFd,
    /// What it brought itself, which its whiteouts do not mean.
    seen: HashSet<Vec<u8>>,
}

impl Unpacker<'_> {
    /// The tree's own directory, as a layer has it.
    pub(super) fn top<R: Read>(&self, entry: &mut tar::Entry<'_, R>) -> Result<()> {
        let attributes = self.attributes(entry)?;
        let mode = entry.header().mode().map_err(|e| self.broken(e))? & 0o7777;
        match (&self.layer, entry.header().entry_type()) {
            (Some(layer), tar::EntryType::Directory) => self.own(&layer.tree, &attributes, mode, b"/"),
            _ => Err(self.invalid("the top of a layer is no directory")),
        }
    }

    /// Acts on a mark that something of the layers below is not there; is it one?
    pub(super) fn whiteout(&mut self, path: &[u8]) -> Result<bool> {
        let at = path.iter().rposition(|b| *b == b'/').map_or(0, |i| i + 1);
        let (above, name) = (&path[..at.saturating_sub(1)], &path[at..]);
        let Some(gone) = name.strip_prefix(b".wh.".as_slice()) else {
            if let Some(layer) = &mut self.layer {
                layer.seen.insert(path.to_vec());
            }
            return Ok(false);
        };
        self.parent = None;
        let opened = self.open_beneath(above, OFlags::RDONLY | OFlags::DIRECTORY);
        let directory = match opened {
            // What is not there needs not to go.
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(true),
            r => self.store(r, path)?,
        };
        match gone {
            b".wh..opq" => self.clear_below(&directory, above)?,
            // Other marks of aufs mean nothing.
            _ if gone.starts_with(b".wh.") => {}
            b"" | b"." | b".." => return Err(self.invalid(format!("{:?} names nothing", show(path)))),
            name => self.clear_one(&directory, name, &[above, b"/", name].concat())?,
        }
        Ok(true)
    }

    /// Removes what lies in a directory and does not come from this layer.
    fn clear_below(&self, directory: &OwnedFd, path: &[u8]) -> Result<()> {
        let mut names = vec![];
        let list = rustix::fs::Dir::read_from(directory);
        for entry in self.store(list, path)? {
            let name = self.store(entry, path)?.file_name().to_bytes().to_vec();
            if name != b"." && name != b".." {
                names.push(name);
            }
        }
        names.iter().try_for_each(|name| self.clear_one(directory, name, &[path, b"/", name].concat()))
    }

    /// Removes what has this name and does not come from this layer.
    fn clear_one(&self, directory: &OwnedFd, name: &[u8], path: &[u8]) -> Result<()> {
        let own = self.layer.as_ref().is_some_and(|l| l.seen.contains(path));
        self.clear_entry(directory, name, path, own)
    }

    /// As [`Self::clear_one`]; `own` tells whether it comes from this layer.
    pub(super) fn clear_entry(&self, directory: &OwnedFd, name: &[u8], path: &[u8], own: bool) -> Result<()> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match rustix::fs::openat(directory, name, flags, Mode::empty()) {
            Ok(inner) => {
                self.clear_below(&inner, path)?;
                if own {
                    return Ok(());
                }
                // Not empty: something of this layer is in it.
                match rustix::fs::unlinkat(directory, name, AtFlags::REMOVEDIR) {
                    Ok(()) | Err(Errno::NOENT | Errno::NOTEMPTY) => Ok(()),
                    r => self.store(r, path),
                }
            }
            Err(Errno::NOENT) => Ok(()),
            Err(Errno::NOTDIR | Errno::LOOP) if own => Ok(()),
            Err(Errno::NOTDIR | Errno::LOOP) => match rustix::fs::unlinkat(directory, name, AtFlags::empty())
            {
                Ok(()) | Err(Errno::NOENT) => Ok(()),
                r => self.store(r, path),
            },
            Err(e) => self.store(Err(e), path),
        }
    }
}
