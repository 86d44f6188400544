//! Files of simulated guests: what was written, over a few that every guest has.

use super::state::{SimulatedFile, State};
use crate::calls::{FileOpened, FileRef};
use karst_model::{
    Error, Result,
    guest::{FileInfo, FileKind, FileWrite},
    instance::InstanceKind,
};
use rustix::fs::{MemfdFlags, SeekFrom, memfd_create, seek};
use std::{collections::BTreeSet, io::Write, os::fd::OwnedFd, sync::Arc};

const DIRECTORIES: &[&str] = &["/", "/etc", "/home", "/root", "/tmp", "/usr", "/usr/bin", "/var", "/var/log"];

/// An absolute path without detours.
pub(crate) fn check_path(path: &str) -> Result<()> {
    let wrong = |why: &str| Err(Error::invalid("path", format!("{path:?} {why}")));
    if !path.starts_with('/') {
        return wrong("is not an absolute path");
    }
    if path.len() > 4095 || path.contains('\0') {
        return wrong("is not a path");
    }
    if path.split('/').any(|part| part == "..") {
        return wrong("must not contain \"..\"");
    }
    Ok(())
}

fn tidy(path: &str) -> String {
    let parts: Vec<_> = path.split('/').filter(|p| !p.is_empty() && *p != ".").collect();
    format!("/{}", parts.join("/"))
}

/// A descriptor to read `data` from.
pub(super) fn content(data: &[u8]) -> Result<OwnedFd> {
    let fd = memfd_create("karst-simulated", MemfdFlags::CLOEXEC).map_err(std::io::Error::from)?;
    let mut file = std::fs::File::from(fd);
    file.write_all(data)?;
    seek(&file, SeekFrom::Start(0)).map_err(std::io::Error::from)?;
    Ok(file.into())
}

impl State {
    /// Can files of this guest be reached? Those of a container always, those of a virtual machine while it runs.
    fn reach(&self, file: &FileRef) -> Result<String> {
        check_path(&file.path)?;
        let known = self.volumes.get(&file.root.volume).filter(|v| v.spec.pool == file.root.pool);
        if known.is_none() {
            return Err(Error::not_found(format!("volume {} is not on this host", file.root.volume)));
        }
        let runs = self.guests.get(&file.instance).is_some_and(|g| g.runs());
        if file.kind == InstanceKind::VirtualMachine && !runs {
            return Err(Error::conflict(
                "files of a virtual machine can be reached while it runs only; start it",
            ));
        }
        Ok(tidy(&file.path))
    }

    fn file(&self, of: &FileRef, path: &str) -> Option<SimulatedFile> {
        let plain = |kind, mode, data: Vec<u8>| SimulatedFile {
            kind,
            data: Arc::new(data),
            uid: 0,
            gid: 0,
            mode,
            modified: 0,
            target: None,
        };
        let volume = self.volumes.get(&of.root.volume)?;
        if let Some(file) = volume.held.files.get(path) {
            return Some(file.clone());
        }
        if DIRECTORIES.contains(&path) {
            return Some(plain(FileKind::Directory, 0o755, vec![]));
        }
        match path {
            "/etc/hostname" => {
                let name = self.guests.get(&of.instance).map_or("localhost", |g| &g.spec.hostname);
                Some(plain(FileKind::File, 0o644, format!("{name}\n").into_bytes()))
            }
            "/etc/os-release" => {
                Some(plain(FileKind::File, 0o644, b"ID=debian\nVERSION_ID=\"12\"\n".to_vec()))
            }
            _ => None,
        }
    }

    fn entries(&self, of: &FileRef, path: &str) -> Vec<String> {
        let prefix = if path == "/" { "/".to_owned() } else { format!("{path}/") };
        let written = self.volumes.get(&of.root.volume).map(|v| v.held.files.keys());
        let all = DIRECTORIES
            .iter()
            .copied()
            .chain(["/etc/hostname", "/etc/os-release"])
            .chain(written.into_iter().flatten().map(String::as_str));
        let names: BTreeSet<String> = all
            .filter_map(|p| p.strip_prefix(&prefix))
            .filter(|rest| !rest.is_empty() && !rest.contains('/'))
            .map(str::to_owned)
            .collect();
        names.into_iter().collect()
    }

    pub fn open_file(&self, of: &FileRef) -> Result<(FileOpened, Option<OwnedFd>)> {
        let path = self.reach(of)?;
        let file = self.file(of, &path).ok_or_else(|| missing(&path))?;
        let info = FileInfo {
            kind: file.kind,
            uid: file.uid,
            gid: file.gid,
            mode: file.mode,
            size: file.data.len() as u64,
            modified: file.modified,
        };
        let entries = match file.kind {
            FileKind::Directory => self.entries(of, &path),
            _ => vec![],
        };
        let fd = match file.kind {
            FileKind::File => Some(content(&file.data)?),
            _ => None,
        };
        Ok((FileOpened { info, entries, target: file.target }, fd))
    }

    /// Checks a write before any content comes.
    pub fn may_write(&self, of: &FileRef, write: &FileWrite) -> Result<()> {
        let path = self.reach(of)?;
        let parent = path.rsplit_once('/').map_or("/", |(p, _)| if p.is_empty() { "/" } else { p });
        match self.file(of, parent) {
            Some(f) if f.kind == FileKind::Directory => {}
            Some(_) => return Err(Error::invalid("path", format!("{parent:?} is not a directory"))),
            None => return Err(missing(parent)),
        }
        match self.file(of, &path) {
            Some(f) if (f.kind == FileKind::Directory) != (write.kind == FileKind::Directory) => {
                Err(Error::conflict(format!("{path:?} is there already, and of another kind")))
            }
            _ => Ok(()),
        }
    }

    pub fn write_file(&mut self, of: &FileRef, write: &FileWrite, data: Vec<u8>, now: i64) -> Result<()> {
        self.may_write(of, write)?;
        let path = tidy(&of.path);
        let old = self.file(of, &path);
        let default = if write.kind == FileKind::Directory { 0o755 } else { 0o644 };
        let mut whole = match &old {
            Some(old) if write.append => old.data.to_vec(),
            _ => vec![],
        };
        whole.extend(data);
        let file = SimulatedFile {
            kind: write.kind,
            data: Arc::new(whole),
            uid: write.uid.or(old.as_ref().map(|o| o.uid)).unwrap_or(0),
            gid: write.gid.or(old.as_ref().map(|o| o.gid)).unwrap_or(0),
            mode: write.mode.or(old.as_ref().map(|o| o.mode)).unwrap_or(default),
            modified: now,
            target: write.target.clone(),
        };
        if let Some(volume) = self.volumes.get_mut(&of.root.volume) {
            volume.held.files.insert(path, file);
        }
        Ok(())
    }

    pub fn delete_file(&mut self, of: &FileRef) -> Result<()> {
        let path = self.reach(of)?;
        let file = self.file(of, &path).ok_or_else(|| missing(&path))?;
        if file.kind == FileKind::Directory && !self.entries(of, &path).is_empty() {
            return Err(Error::conflict(format!("directory {path:?} is not empty")));
        }
        let written = self.volumes.get_mut(&of.root.volume).and_then(|v| v.held.files.remove(&path));
        written
            .map(|_| ())
            .ok_or_else(|| Error::unsupported(format!("{path:?} belongs to the simulation and stays")))
    }
}

fn missing(path: &str) -> Error {
    Error::not_found(format!("there is no file {path:?} in the guest")).at("path")
}
