//! What virtual machines are beside their disks, on its way: to a copy, into a backup and out of one. Names of files in a
//! backup are Incus' (see `karst_image::machine`).
//!
//! Such a state may come to a machine that was never started here: its directory has the mark of that then
//! ([`crate::registry::Registry::arrive`]), by which it is told from what a broken start left.

use crate::{RealAgent, agent::blocking, storage::open};
use karst_agent::{MachineBackup, MachineFill, MachineStateCopy};
use karst_guest::{GuestMachine, MachineFiles};
use karst_host::sandbox::Sandbox;
use karst_image::machine::{IN_USE, LINK, PLAIN, SECURE, TPM, TPM_FILE, Wanted};
use karst_model::{
    Error, InstanceId, Result, SnapshotId,
    instance::{Firmware, InstanceKind},
};
use std::{
    fs::{DirBuilder, File, Permissions},
    io::{Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::Path,
};

use crate::staging::Scratch;

/// Bytes of a file of a state at most.
const LARGEST: u64 = 4 << 20;
/// Where the worker puts what it takes out of a backup.
const PLACE: &str = "state";

impl RealAgent {
    /// The driver of virtual machines, also for one that never ran here.
    pub(crate) fn machines(&self) -> Result<&dyn GuestMachine> {
        self.driver(InstanceKind::VirtualMachine)?
            .machine()
            .ok_or_else(|| Error::unsupported("this host runs no virtual machines"))
    }

    pub(crate) async fn copy_machine(&self, request: MachineStateCopy) -> Result<()> {
        let MachineStateCopy { from, at, to, to_at } = request;
        if from == to {
            return Err(Error::invalid("to", "a machine is not copied to itself"));
        }
        let _first = self.lock(from.0.min(to.0)).await;
        let _second = self.lock(from.0.max(to.0)).await;
        self.demand_machine(from)?;
        let files = self.machines()?.state_read(from, at).await?;
        self.put_machine(to, to_at, files).await
    }

    fn demand_machine(&self, id: InstanceId) -> Result<()> {
        match self.guest(id) {
            Some(record) if record.kind != InstanceKind::VirtualMachine => Err(Error::unsupported(format!(
                "instance {id} is a container: it has no firmware and no TPM"
            ))),
            _ => Ok(()),
        }
    }

    /// Makes it what a machine is. The caller holds its lock.
    async fn put_machine(&self, id: InstanceId, at: Option<SnapshotId>, files: MachineFiles) -> Result<()> {
        self.demand_machine(id)?;
        if self.guest(id).is_none() {
            if files.is_empty() && !self.registry.arrived(id) {
                return Ok(());
            }
            let registry = self.registry.clone();
            blocking(move || registry.arrive(id)).await?;
        }
        self.machines()?.state_write(id, at, files).await
    }

    /// A directory as it lies in a backup, with what a machine is or was; `None` where it is nothing.
    pub(crate) async fn machine_for_backup(
        &self,
        machine: &MachineBackup,
        at: Option<SnapshotId>,
        tpm: Option<String>,
    ) -> Result<Option<Scratch>> {
        self.demand_machine(machine.instance)?;
        let files = self.machines()?.state_read(machine.instance, at).await?;
        if files.is_empty() {
            return Ok(None);
        }
        let room = self.staging.work()?;
        let firmware = machine.firmware;
        let place = room.path().to_owned();
        blocking(move || lay_out(&files, firmware, tpm.as_deref(), &place)).await?;
        Ok(Some(room))
    }

    /// Room for what a worker finds of a machine in a backup, and its task.
    pub(crate) fn machine_from_backup(
        &self,
        worker: Sandbox,
        machine: &MachineFill,
        directory: String,
    ) -> Result<(Sandbox, Wanted, Scratch)> {
        let room = self.staging.work()?;
        let worker = worker.writable(PLACE, open(room.path(), false)?);
        let place = Path::new("/").join(PLACE);
        Ok((worker, Wanted { directory, tpm: machine.tpm.clone(), place }, room))
    }

    /// Makes the machine what the worker found. The caller holds its lock.
    pub(crate) async fn take_machine(&self, machine: &MachineFill, room: &Path) -> Result<()> {
        let (id, firmware, room) = (machine.instance, machine.firmware, room.to_owned());
        let (files, strange) = blocking(move || found(firmware, &room)).await?;
        for size in strange {
            tracing::warn!(
                instance = %id, size,
                "the variables of a firmware in a backup do not fit this host's; the machine begins with fresh ones"
            );
        }
        self.put_machine(id, machine.at, files).await
    }
}

fn write(path: &Path, content: &[u8]) -> Result<()> {
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(path)?;
    Ok(file.write_all(content)?)
}

/// Lays a state out as Incus does.
fn lay_out(files: &MachineFiles, firmware: Firmware, tpm: Option<&str>, place: &Path) -> Result<()> {
    std::fs::set_permissions(place, Permissions::from_mode(0o711))?;
    for (of, name, content) in
        [(Firmware::Uefi, PLAIN, &files.variables), (Firmware::UefiSecure, SECURE, &files.secure_variables)]
    {
        if let Some(content) = content {
            write(&place.join(name), content)?;
            if of == firmware {
                std::os::unix::fs::symlink(name, place.join(LINK))?;
            }
        }
    }
    if let Some(device) = tpm.filter(|_| !files.tpm.is_empty()) {
        if device.is_empty() || device.len() > 64 || device.contains(['/', '\0']) {
            return Err(Error::invalid("tpm", format!("{device:?} is not the name of a device")));
        }
        let place = place.join(format!("{TPM}{device}"));
        DirBuilder::new().mode(0o700).create(&place)?;
        for (name, content) in &files.tpm {
            write(&place.join(name), content)?;
        }
    }
    Ok(())
}

/// Most files of a TPM that are taken from a backup.
const MOST: usize = 8;

/// What a worker stored, and the sizes of variables that are none of this firmware's.
fn found(firmware: Firmware, place: &Path) -> Result<(MachineFiles, Vec<usize>)> {
    let mut files = MachineFiles::default();
    let mut in_use = None;
    for entry in std::fs::read_dir(place)? {
        let entry = entry?;
        let flags = (rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK).bits() as i32;
        let file = File::options().read(true).custom_flags(flags).open(entry.path())?;
        let mut content = vec![];
        if file.metadata()?.is_file() {
            file.take(LARGEST + 1).read_to_end(&mut content)?;
        }
        if content.len() as u64 > LARGEST {
            return Err(Error::invalid("backup", "the state of the machine in the backup is too large"));
        }
        if files.tpm.len() > MOST {
            return Err(Error::invalid("backup", "the TPM in the backup has too many files"));
        }
        match entry.file_name().to_str() {
            Some(IN_USE) => in_use = Some(content),
            Some(PLAIN) => files.variables = Some(content),
            Some(SECURE) => files.secure_variables = Some(content),
            Some(name) if name.starts_with(TPM_FILE) => drop(files.tpm.insert(name.to_owned(), content)),
            _ => {}
        }
    }
    match firmware {
        Firmware::Bios => {}
        Firmware::Uefi => files.variables = in_use.or(files.variables),
        Firmware::UefiSecure => files.secure_variables = in_use.or(files.secure_variables),
    }
    let mut strange = vec![];
    for variables in [&mut files.variables, &mut files.secure_variables] {
        if let Some(size) = variables.as_ref().map(Vec::len).filter(|s| *s != MachineFiles::VARIABLES) {
            strange.push(size);
            *variables = None;
        }
    }
    Ok((files, strange))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_laid_out_is_found_again() {
        let of = |byte| Some(vec![byte; MachineFiles::VARIABLES]);
        let tpm = [("tpm2-00.permall".to_owned(), b"seed".to_vec())].into();
        let files = MachineFiles { variables: of(1), secure_variables: of(2), tpm };
        let place = tempfile::tempdir().unwrap();
        lay_out(&files, Firmware::UefiSecure, Some("chip"), place.path()).unwrap();
        assert_eq!(std::fs::read_link(place.path().join(LINK)).unwrap(), Path::new(SECURE));
        let inner = place.path().join("tpm.chip");
        assert_eq!(std::fs::read(inner.join("tpm2-00.permall")).unwrap(), b"seed");
        assert_eq!(std::fs::metadata(&inner).unwrap().permissions().mode() & 0o777, 0o700);
        assert!(lay_out(&files, Firmware::Bios, Some("../x"), tempfile::tempdir().unwrap().path()).is_err());

        // As the worker stores it.
        let room = tempfile::tempdir().unwrap();
        for (name, content) in [(IN_USE, &files.secure_variables), (PLAIN, &files.variables)] {
            write(&room.path().join(name), content.as_ref().unwrap()).unwrap();
        }
        write(&room.path().join("tpm2-00.permall"), b"seed").unwrap();
        assert_eq!(found(Firmware::UefiSecure, room.path()).unwrap(), (files.clone(), vec![]));
        // The same file in use with other firmware is that one's.
        let other = found(Firmware::Uefi, room.path()).unwrap().0;
        assert_eq!((other.variables, other.secure_variables), (of(2), None));
        assert_eq!(found(Firmware::Bios, room.path()).unwrap().0.secure_variables, None);
        std::fs::write(room.path().join(IN_USE), [0; 131_072]).unwrap();
        let (small, strange) = found(Firmware::UefiSecure, room.path()).unwrap();
        assert_eq!((small.secure_variables, strange), (None, vec![131_072]));
        // Whatever a worker that was taken over leaves there, root reads nothing else.
        std::os::unix::fs::symlink("/etc/shadow", room.path().join(SECURE)).unwrap();
        assert!(found(Firmware::Bios, room.path()).is_err());
    }
}
