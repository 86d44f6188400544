//! Containers of LUKS, made by `qemu-img` in a worker without privileges.
//!
//! The worker has nothing but a file system in memory of its own: it finds the passphrase there and leaves the container. So the
//! passphrase is in no argument, no environment and on no disk, and ends with the worker. What is made has a mebibyte of content; a
//! container of this version does not say how long its content is, so a volume of any size is made of it by growing it, and grows later,
//! without the passphrase.

use crate::{Format, Source, files::blocking};
use karst_host::{
    Program,
    mountns::in_memory,
    sandbox::{Launcher, Sandbox},
};
use karst_model::{
    Error, Result,
    encryption::{Encryption, Passphrase},
};
use rustix::fs::{Mode, OFlags, openat};
use std::{
    fs::File,
    io::{self, Read, Write},
    os::{fd::OwnedFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
};

/// Bytes of the content that a container is made with.
const CONTENT: u64 = 1 << 20;
/// Bytes of the file system in which it is made.
const ROOM: u64 = 32 << 20;
const PASSPHRASE: &str = "passphrase";
const MADE: &str = "container";

/// A container that was made, as a file; it is removed when this is dropped.
#[derive(Debug)]
pub struct Container {
    path: PathBuf,
    size: u64,
}

impl Container {
    /// Makes one in `directory`, which is this process' own.
    ///
    /// # Errors
    /// Unsupported when QEMU of this host does not have the cipher; what else keeps `qemu-img` from it.
    pub async fn make(
        worker: &Launcher,
        directory: &Path,
        encryption: Encryption,
        passphrase: &Passphrase,
    ) -> Result<Self> {
        let sandbox = Sandbox::new(worker);
        let owner = sandbox.ids().base;
        let passphrase = passphrase.clone();
        let room = blocking(move || {
            let room = in_memory(Some(ROOM), (owner, owner), false)?;
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
            // The worker's ids are other ones; nobody but it gets there.
            let mode = Mode::from_raw_mode(0o644);
            let file = openat(&room, PASSPHRASE, flags, mode).map_err(io::Error::from)?;
            rustix::fs::fchmod(&file, mode).map_err(io::Error::from)?;
            File::from(file).write_all(passphrase.text().as_bytes())?;
            Ok(room)
        })
        .await?;
        let content = CONTENT.to_string();
        let (object, made) = (format!("secret,id=key,file=/room/{PASSPHRASE}"), format!("/room/{MADE}"));
        let options = format!("key-secret=key,{}", encryption.options());
        let args = ["create", "-q", "-f", "luks", "--object", &object, "-o", &options, &made, &content];
        let ended = sandbox.mounted("room", room.try_clone()?).exec(Program::QemuImg, &args).await?;
        ended.ok("qemu-img").map_err(|e| explained(e, encryption))?;
        let path = directory.join(format!("{}.luks", uuid::Uuid::new_v4()));
        blocking(move || {
            let bytes = read(&room)?;
            check(&bytes, encryption)?;
            let size = bytes.len() as u64;
            // Known before it is there: what fails in between is removed too.
            let container = Self { path, size };
            let file = File::options().write(true).create_new(true).mode(0o600).open(&container.path);
            file?.write_all(&bytes)?;
            Ok(container)
        })
        .await
    }

    /// It, as what a volume is made of.
    pub fn source(&self) -> Source {
        let (path, size) = (self.path.clone(), self.size);
        Source::Disk { path, format: Format::Raw, backing: None, size, image: None }
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        match std::fs::remove_file(&self.path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(error = %e, "an empty container was left; the next start removes it");
            }
            _ => {}
        }
    }
}

/// What the worker made: a plain file, and not longer than it can be.
fn read(room: &OwnedFd) -> Result<Vec<u8>> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(openat(room, MADE, flags, Mode::empty()).map_err(io::Error::from)?);
    let mut bytes = vec![];
    if file.metadata()?.is_file() {
        file.take(ROOM).read_to_end(&mut bytes)?;
    }
    Ok(bytes)
}

/// Is it what was asked for: of this version, with its content where it is said to be?
fn check(bytes: &[u8], encryption: Encryption) -> Result<()> {
    let header = encryption.header();
    let sectors: Option<[u8; 4]> = bytes.get(104..108).and_then(|b| b.try_into().ok());
    let begins = sectors.map(|b| u64::from(u32::from_be_bytes(b)) * 512);
    if bytes.starts_with(b"LUKS\xba\xbe\x00\x01")
        && begins == Some(header)
        && bytes.len() as u64 == header + CONTENT
    {
        return Ok(());
    }
    Err(Error::internal(
        "QEMU of this host made another container than was asked for",
        format!("{} bytes, whose content begins at {begins:?} and not {header}", bytes.len()),
    ))
}

/// What `qemu-img` cannot do, in words.
fn explained(e: Error, encryption: Encryption) -> Error {
    let said = e.context.clone().unwrap_or_default();
    if said.contains("not supported") || said.contains("nsupported") {
        let (cipher, mode) = (encryption.cipher.as_str(), encryption.mode.as_str());
        return Error::unsupported(format!(
            "QEMU of this host cannot encrypt so ({cipher}-{mode}, {}); aes-256-xts it can",
            encryption.hash.as_str()
        ))
        .at("config.encryption.cipher")
        .with_context(said);
    }
    e
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_such_container_is_refused() {
        let usual = Encryption::default();
        let mut good = vec![0; (usual.header() + CONTENT) as usize];
        good[..8].copy_from_slice(b"LUKS\xba\xbe\x00\x01");
        good[104..108].copy_from_slice(&((usual.header() / 512) as u32).to_be_bytes());
        check(&good, usual).unwrap();
        type Change = fn(&mut Vec<u8>);
        let bad: [Change; 4] =
            [|b| b[7] = 2, |b| b[107] ^= 1, |b| b.truncate(100), |b| b.truncate(b.len() - 512)];
        for change in bad {
            let mut bytes = good.clone();
            change(&mut bytes);
            assert!(check(&bytes, usual).is_err());
        }
        let e = Error::internal(
            "qemu-img failed",
            "exit code 1: Unsupported cipher algorithm serpent-256 with xts",
        );
        assert!(explained(e, usual).is(karst_model::ErrorKind::Unsupported));
    }
}
