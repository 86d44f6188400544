//! What a backup of a virtual machine has beside its disk, in Incus' layout: the part that runs inside the worker.
//!
//! ```text
//! DIRECTORY/qemu.nvram                -> the variables that its firmware uses (older versions: the file itself)
//! DIRECTORY/OVMF_VARS_4M.ms.fd        variables by the name of the template that they were made of
//! DIRECTORY/tpm.DEVICE/tpm2-00.permall
//! ```
//! Each file is small and counted; nothing else of the directory is taken. What a variable or a TPM's file holds nobody
//! here reads: firmware and swtpm do, as the guest's own user.

use karst_model::{Error, Result};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    fs::File,
    io::{Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

/// The link to the variables in use, or they themselves.
pub const LINK: &str = "qemu.nvram";
/// Variables of UEFI.
pub const PLAIN: &str = "OVMF_VARS_4M.fd";
/// Variables of UEFI with secure boot.
pub const SECURE: &str = "OVMF_VARS_4M.ms.fd";
/// Before the name of the device, in the name of a TPM's directory.
pub const TPM: &str = "tpm.";
/// What files of a TPM are called that are of use.
pub const TPM_FILE: &str = "tpm2-";
/// The variables in use, as [`Wanted::place`] has them.
pub const IN_USE: &str = "in-use";

const LARGEST: u64 = 4 << 20;
const MOST: usize = 8;

/// Where in an archive it lies, and where it goes.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Wanted {
    /// Directory of the archive.
    pub directory: String,
    /// Name of the device that is the TPM.
    pub tpm: Option<String>,
    /// Directory that gets [`IN_USE`], [`PLAIN`] and [`SECURE`], and the files of the TPM by their names.
    pub place: PathBuf,
}

/// What was found so far.
pub(crate) struct Taken<'a> {
    wanted: &'a Wanted,
    field: &'a str,
    /// What the link leads to, in the same directory.
    link: Option<Vec<u8>>,
    in_use: Option<Vec<u8>>,
    variables: BTreeMap<Vec<u8>, Vec<u8>>,
    tpm: BTreeMap<String, Vec<u8>>,
}

impl<'a> Taken<'a> {
    pub(crate) fn new(wanted: &'a Wanted, field: &'a str) -> Self {
        let (link, in_use) = (None, None);
        Self { wanted, field, link, in_use, variables: BTreeMap::new(), tpm: BTreeMap::new() }
    }

    /// Takes an entry of the archive if it is one of these.
    pub(crate) fn entry<R: Read>(&mut self, path: &[u8], entry: &mut tar::Entry<'_, R>) -> Result<()> {
        let Some([b'/', name @ ..]) = path.strip_prefix(self.wanted.directory.as_bytes()) else {
            return Ok(());
        };
        let kind = entry.header().entry_type();
        let file = matches!(kind, tar::EntryType::Regular | tar::EntryType::Continuous);
        if name == LINK.as_bytes() && kind == tar::EntryType::Symlink {
            let target = entry.link_name_bytes().map(|t| t.into_owned());
            self.link = target.filter(|t| !t.contains(&b'/'));
        } else if name == LINK.as_bytes() && file {
            self.in_use = Some(self.read(entry)?);
        } else if file && !name.contains(&b'/') && (name.ends_with(b".fd") || name.ends_with(b".bin")) {
            let content = self.read(entry)?;
            self.variables.insert(name.to_vec(), content);
        } else if file && let Some(name) = self.of_tpm(name) {
            let content = self.read(entry)?;
            self.tpm.insert(name, content);
        }
        match self.variables.len() > MOST || self.tpm.len() > MOST {
            true => {
                Err(Error::invalid(self.field, "the backup has too many files beside the machine's disk"))
            }
            false => Ok(()),
        }
    }

    /// The name of a file of the TPM.
    fn of_tpm(&self, name: &[u8]) -> Option<String> {
        let below = name.strip_prefix(TPM.as_bytes())?.strip_prefix(self.wanted.tpm.as_ref()?.as_bytes())?;
        let name = std::str::from_utf8(below.strip_prefix(b"/")?).ok()?;
        let plain = name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b));
        (name.starts_with(TPM_FILE) && name.len() <= 64 && plain).then(|| name.to_owned())
    }

    fn read<R: Read>(&self, entry: &mut tar::Entry<'_, R>) -> Result<Vec<u8>> {
        let mut content = vec![];
        let cut = |e| Error::invalid(self.field, "the archive is corrupt or cut off").with_context(e);
        entry.take(LARGEST + 1).read_to_end(&mut content).map_err(cut)?;
        if content.len() as u64 > LARGEST {
            let text = "the variables or the TPM of the machine in the backup are larger than 4 MiB";
            return Err(Error::invalid(self.field, text));
        }
        Ok(content)
    }

    /// Stores what was found.
    pub(crate) fn store(mut self) -> Result<()> {
        let linked = self.link.take().and_then(|name| self.variables.remove(&name));
        let of = |name: &str| (name.to_owned(), self.variables.get(name.as_bytes()).cloned());
        let named = [(IN_USE.to_owned(), linked.or(self.in_use)), of(PLAIN), of(SECURE)];
        let tpm = self.tpm.into_iter().map(|(name, content)| (name, Some(content)));
        for (name, content) in named.into_iter().chain(tpm) {
            if let Some(content) = content {
                put(&self.wanted.place, &name, &content)?;
            }
        }
        Ok(())
    }
}

fn put(place: &Path, name: &str, content: &[u8]) -> Result<()> {
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(place.join(name))?;
    Ok(file.write_all(content)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::unpack::{Bounds, Part, Task, unpack};

    enum What<'a> {
        File(&'a [u8]),
        Link(&'a str),
    }

    /// What is taken out of an archive with these entries and a disk, by name.
    fn taken(entries: &[(&str, What<'_>)], tpm: Option<&str>) -> Result<BTreeMap<String, Vec<u8>>> {
        let mut archive = tar::Builder::new(vec![]);
        let disk = ("backup/virtual-machine.img", What::File(b"disk"));
        for (path, what) in entries.iter().chain([&disk]) {
            let mut header = tar::Header::new_gnu();
            header.set_mode(0o600);
            header.set_uid(0);
            header.set_gid(0);
            header.set_mtime(0);
            match what {
                What::File(content) => {
                    header.set_size(content.len() as u64);
                    archive.append_data(&mut header, path, *content).unwrap();
                }
                What::Link(target) => {
                    header.set_entry_type(tar::EntryType::Symlink);
                    header.set_size(0);
                    archive.append_link(&mut header, path, target).unwrap();
                }
            }
        }
        let (out, place) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let wanted = Wanted {
            directory: "backup/virtual-machine".into(),
            tpm: tpm.map(str::to_owned),
            place: place.path().to_owned(),
        };
        let task = Task {
            part: Part::Disk,
            bounds: Bounds::default(),
            field: "backup".into(),
            within: Some("backup/virtual-machine.img".into()),
            beside: Some("backup/virtual-machine".into()),
            machine: Some(wanted),
        };
        unpack(archive.into_inner().unwrap().as_slice(), out.path(), &task)?;
        assert_eq!(std::fs::read(out.path().join("disk.img")).unwrap(), b"disk");
        let entries = std::fs::read_dir(place.path()).unwrap().map(|e| e.unwrap());
        Ok(entries
            .map(|e| (e.file_name().into_string().unwrap(), std::fs::read(e.path()).unwrap()))
            .collect())
    }

    fn expected(list: &[(&str, &[u8])]) -> BTreeMap<String, Vec<u8>> {
        list.iter().map(|(name, content)| ((*name).to_owned(), content.to_vec())).collect()
    }

    #[test]
    fn what_incus_lays_beside_the_disk_is_taken() {
        let own = [
            ("backup/virtual-machine/backup.yaml", What::File(b"config: {}")),
            ("backup/virtual-machine/OVMF_VARS.4MB.ms.fd", What::File(b"used")),
            ("backup/virtual-machine/qemu.nvram", What::Link("OVMF_VARS.4MB.ms.fd")),
            ("backup/virtual-machine/tpm.chip/tpm2-00.permall", What::File(b"seed")),
            ("backup/virtual-machine/tpm.chip/.lock", What::File(b"")),
            ("backup/virtual-machine/tpm.other/tpm2-00.permall", What::File(b"another's")),
            ("backup/virtual-machine/tpm.chip/deep/tpm2-00.permall", What::File(b"deep")),
            ("backup/virtual-machine-snapshots/s0/OVMF_VARS_4M.fd", What::File(b"then")),
            ("backup/virtual-machine/agent.key", What::File(b"key")),
        ];
        assert_eq!(
            taken(&own, Some("chip")).unwrap(),
            expected(&[(IN_USE, b"used"), ("tpm2-00.permall", b"seed")])
        );
        assert_eq!(taken(&own, None).unwrap(), expected(&[(IN_USE, b"used")]));
        assert_eq!(taken(&own[3..], Some("none")).unwrap(), expected(&[]));
        // Older versions; and two kinds, as they are written here.
        let older = [("backup/virtual-machine/qemu.nvram", What::File(b"itself"))];
        assert_eq!(taken(&older, None).unwrap(), expected(&[(IN_USE, b"itself")]));
        let both = [
            ("backup/virtual-machine/OVMF_VARS_4M.fd", What::File(b"plain")),
            ("backup/virtual-machine/OVMF_VARS_4M.ms.fd", What::File(b"keys")),
            ("backup/virtual-machine/qemu.nvram", What::Link("OVMF_VARS_4M.ms.fd")),
        ];
        assert_eq!(taken(&both, None).unwrap(), expected(&[(IN_USE, b"keys"), (PLAIN, b"plain")]));
    }

    #[test]
    fn what_leads_elsewhere_or_is_too_large_is_not() {
        let out = [
            ("backup/virtual-machine/qemu.nvram", What::Link("../../etc/shadow")),
            ("backup/virtual-machine/tpm.chip/tpm2-00.permall", What::Link("/etc/shadow")),
            ("backup/virtual-machine/OVMF_VARS_4M.fd", What::Link("/etc/shadow")),
        ];
        assert_eq!(taken(&out, Some("chip")).unwrap(), expected(&[]));
        let large = vec![1; LARGEST as usize + 1];
        let e = taken(&[("backup/virtual-machine/OVMF_VARS_4M.fd", What::File(&large))], None).unwrap_err();
        assert!(e.message.contains("4 MiB") && e.field.as_deref() == Some("backup"), "{e}");
        let names: Vec<String> = (0..20).map(|n| format!("backup/virtual-machine/{n}.fd")).collect();
        let many: Vec<_> = names.iter().map(|n| (n.as_str(), What::File(b"x"))).collect();
        assert!(taken(&many, None).unwrap_err().message.contains("too many"));
    }
}
