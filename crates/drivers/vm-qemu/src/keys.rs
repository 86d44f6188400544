//! What opens encrypted disks. QEMU reads it from a descriptor of memory that it is given (`secret` with `file=/dev/fd/N`): so it is in
//! none of QEMU's arguments, in no command to it and in no property that a monitor could ask for, and what runs already needs it no
//! more. Nothing here is written down.

use crate::{devices::Disk, qmp::Qmp, record::Record};
use karst_guest::{ResolvedDisk, ResolvedGuest};
use karst_model::{Error, ErrorKind, Result};
use serde_json::{Value, json};
use std::os::fd::{AsFd, OwnedFd};

/// Beyond the descriptor sets of disks: each key's is the one of its disk, and so much more.
const SETS: u32 = 2000;

/// The passphrase of an encrypted disk that is about to be opened, for QEMU to read; nothing of others.
///
/// # Errors
/// Conflict, naming the secret, when it was not handed over.
pub(crate) fn descriptor(disk: &ResolvedDisk) -> Result<Option<OwnedFd>> {
    let Some(secret) = disk.io.secret else { return Ok(None) };
    match &disk.key {
        Some(key) => Ok(Some(crate::launch::sealed("key", key.text().as_bytes())?)),
        None => Err(Error::conflict(format!(
            "the disk {:?} is encrypted, and the secret {secret} that opens it has no value here; set it (karst secret set, or \
             virsh secret-set-value), and try again",
            disk.name
        ))
        .at(format!("devices.{}.encryption.secret", disk.name))),
    }
}

/// What the state of a machine's TPM is encrypted with, for `swtpm` to read; nothing where it is not.
///
/// # Errors
/// Conflict, naming the secret, when it was not handed over.
pub(crate) fn of_tpm(guest: &ResolvedGuest) -> Result<Option<OwnedFd>> {
    let Some(secret) = guest.machine.as_ref().and_then(|m| m.tpm_secret) else { return Ok(None) };
    match &guest.tpm_key {
        Some(key) => Ok(Some(crate::launch::sealed("key", key.text().as_bytes())?)),
        None => Err(Error::conflict(format!(
            "the state of the TPM is encrypted, and the secret {secret} has no value here; set it (karst secret set, or \
             virsh secret-set-value), and try again"
        ))),
    }
}

/// Gives a QEMU that runs what opens a disk that is about to be plugged.
pub(crate) async fn give(qmp: &Qmp, disk: &ResolvedDisk, node: &Disk) -> Result<()> {
    let Some(key) = descriptor(disk)? else { return Ok(()) };
    let set = node.fd_sets()?.0 + SETS;
    let add = json!({"fdset-id": set, "opaque": "key"});
    let added = qmp.execute_with_fd("add-fd", add, key.as_fd()).await?;
    let number = added.get("fd").and_then(Value::as_i64).and_then(|n| i32::try_from(n).ok());
    let number =
        number.ok_or_else(|| Error::internal("QEMU does not say which descriptor it has", &added))?;
    qmp.execute("object-add", node.key(number)).await.map(drop)
}

/// Takes it back: what is open needs it no more. Fine where nothing of it is there.
pub(crate) async fn take_back(qmp: &Qmp, node: &Disk) -> Result<()> {
    match qmp.execute("object-del", json!({"id": node.key_name()})).await {
        Err(e) if e.is(ErrorKind::Internal) => {} // there was none
        other => drop(other?),
    }
    match qmp.execute("remove-fd", json!({"fdset-id": node.fd_sets()?.0 + SETS})).await {
        Err(e) if e.is(ErrorKind::Internal) => Ok(()), // as above
        other => other.map(drop),
    }
}

/// What QEMU says of a disk that a passphrase does not open, for a user; nothing of other words.
pub(crate) fn explain(said: &str, disk: Option<&ResolvedDisk>) -> Option<Error> {
    let secret = disk.and_then(|d| d.io.secret).map(|s| format!(" (secret {s})")).unwrap_or_default();
    let which = disk.map_or_else(|| "an encrypted disk".to_owned(), |d| format!("the disk {:?}", d.name));
    let text = if said.contains("Invalid password") {
        format!(
            "the passphrase{secret} does not open {which}; set the value of the secret to the one that it was encrypted with, or name \
             that secret"
        )
    } else if said.contains("Volume is not in LUKS format") || said.contains("LUKS version") {
        format!(
            "{which} is said to be encrypted and is no container of LUKS (version 1); leave the secret out if it is not encrypted, and \
             make the volume again if it was wiped"
        )
    } else {
        return None;
    };
    let e = Error::new(ErrorKind::Invalid, text);
    Some(match disk {
        Some(disk) => e.at(format!("devices.{}.encryption.secret", disk.name)),
        None => e,
    })
}

/// The disk that a line of QEMU's is about: those that it cannot open it names by their node.
pub(crate) fn told_of<'a>(said: &str, record: &'a Record) -> Option<&'a ResolvedDisk> {
    let encrypted = record.devices.iter().flat_map(|d| &d.disks).filter(|d| d.io.secret.is_some());
    let mut all = encrypted.clone();
    let named = encrypted.clone().find(|d| said.contains(&format!("\"i-{}\"", d.slot)));
    // There is one only: it needs no name.
    named.or_else(|| all.next().filter(|_| encrypted.count() == 1))
}

/// Bytes that stand before the content of a container that QEMU has open as this node.
pub(crate) async fn header(qmp: &Qmp, image: &str) -> Result<u64> {
    header_of(&qmp.execute("query-named-block-nodes", json!({"flat": true})).await?, image)
}

/// The same, of what QEMU says of its nodes. Their sizes do not tell: that of a device that has grown is known at once, what is in it
/// is not.
fn header_of(nodes: &Value, image: &str) -> Result<u64> {
    let mut all = nodes.as_array().into_iter().flatten();
    let node = all.find(|n| n.get("node-name").and_then(Value::as_str) == Some(image));
    let header = node.and_then(|n| n.pointer("/image/format-specific/data/payload-offset")?.as_u64());
    header.ok_or_else(|| Error::internal("QEMU does not say where the content of the disk begins", image))
}

#[cfg(test)]
mod tests {
    use super::*;
    use karst_guest::DiskFormat;
    use karst_model::encryption::Passphrase;
    use std::{fs::File, io::Read};

    fn disk() -> ResolvedDisk {
        let mut disk = karst_guest::samples::disk("data", "scsi1", "/a", DiskFormat::Raw);
        disk.io.secret = Some(uuid::Uuid::from_u128(5));
        disk
    }

    #[test]
    fn a_passphrase_is_read_from_memory_and_asked_for_where_it_is_missing() {
        let missing = descriptor(&disk()).unwrap_err();
        assert!(missing.is(ErrorKind::Conflict) && missing.message.contains("0005"), "{missing}");
        assert_eq!(missing.field.as_deref(), Some("devices.data.encryption.secret"));
        let with = ResolvedDisk { key: Some(Passphrase::of(b"open sesame").unwrap()), ..disk() };
        let mut text = String::new();
        File::from(descriptor(&with).unwrap().unwrap()).read_to_string(&mut text).unwrap();
        assert_eq!(text, "open sesame");
        assert!(!format!("{with:?}").contains("sesame"));
        assert!(!serde_json::to_string(&with).unwrap().contains("sesame"), "no record has it");
        let plain = karst_guest::samples::disk("data", "scsi1", "/a", DiskFormat::Raw);
        assert!(descriptor(&plain).unwrap().is_none());
    }

    #[test]
    fn what_qemu_says_of_passphrases_is_said_in_words() {
        let said = "Invalid password, cannot unlock any keyslot";
        let e = explain(said, Some(&disk())).unwrap();
        assert!(
            e.is(ErrorKind::Invalid) && e.message.contains("\"data\"") && e.message.contains("0005"),
            "{e}"
        );
        assert!(explain("Volume is not in LUKS format", None).unwrap().message.contains("encrypted disk"));
        assert!(explain("No space left on device", Some(&disk())).is_none());
    }

    #[test]
    fn where_the_content_begins_is_qemus_word() {
        let luks = json!({"type": "luks", "data": {"payload-offset": 2_068_480, "cipher-alg": "aes-256"}});
        let nodes = json!([
            {"node-name": "f-scsi1", "image": {"virtual-size": 9}},
            {"node-name": "i-scsi1", "image": {"virtual-size": 3, "format-specific": luks}},
        ]);
        assert_eq!(header_of(&nodes, "i-scsi1").unwrap(), 2_068_480);
        assert!(header_of(&nodes, "f-scsi1").is_err() && header_of(&nodes, "i-scsi2").is_err());
    }
}
