//! Backups of disks as XML.

use super::{
    Element, encryption,
    machine::{Source, read as machine_read},
};
use crate::error::{Code, Part, VirError};
use karst_engine::checkpoints::backup::{BackupListen, DiskBackupView};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

/// A disk to be backed up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewDisk {
    /// As the client names it.
    pub name: String,
    /// The checkpoint since which; as the backup says when absent.
    pub since: Option<Since>,
    /// Pool and volume that it is written to.
    pub target: Option<(String, String)>,
    /// What it is called where it is read.
    pub export: Option<String>,
    /// The same of its bitmap.
    pub bitmap: Option<String>,
}

/// What of a disk is backed up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Since {
    /// All.
    Whole,
    /// What changed since a checkpoint.
    Checkpoint(String),
}

/// A backup to be begun.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewBackup {
    /// The checkpoint since which.
    pub since: Option<String>,
    /// Others read it there; else it is written.
    pub listen: Option<BackupListen>,
    /// Its disks; all that are written to when absent.
    pub disks: Option<Vec<NewDisk>>,
}

fn wrong(text: impl Into<String>) -> VirError {
    VirError::new(Code::XmlError, Part::Domain, text)
}

fn refuse(text: impl Into<String>) -> VirError {
    VirError::new(Code::ConfigUnsupported, Part::Qemu, text)
}

fn server(e: &Element) -> Result<BackupListen, VirError> {
    if e.attribute("tls").is_some_and(|v| v != "no") {
        return Err(refuse("server tls: a backup is read on its host, without TLS"));
    }
    match e.attribute("transport").unwrap_or("tcp") {
        "unix" => match e.attribute("socket") {
            None => Ok(BackupListen::Unix),
            Some(_) => Err(refuse(
                "server socket: the host makes it in a place of its own; leave it out, and see backup-dumpxml where it is",
            )),
        },
        "tcp" => {
            let port =
                e.attribute("port").ok_or_else(|| refuse("<domainbackup> must specify TCP port for now"))?;
            let port: u16 =
                port.parse().map_err(|_| wrong(format!("failed to parse port number '{port}'")))?;
            let ip = match e.attribute("name").unwrap_or("localhost") {
                "localhost" => IpAddr::V4(Ipv4Addr::LOCALHOST),
                name => name.parse().map_err(|_| {
                    refuse(format!(
                        "server name: '{name}' is no address; a backup is read at an address of the loopback, such as \
                         localhost or ::1"
                    ))
                })?,
            };
            Ok(BackupListen::Tcp { address: SocketAddr::new(ip, port) })
        }
        other => Err(refuse(format!("server transport: '{other}' is not there; tcp and unix are"))),
    }
}

/// What a disk is written to: `<target file=…>`, by the path of a volume.
fn target(disk: &Element) -> Result<Option<(String, String)>, VirError> {
    let Some(target) = disk.find("target") else { return Ok(None) };
    // As a source of a disk is.
    let kind = disk.attribute("type").unwrap_or("file").to_owned();
    let source = target.clone().renamed("source");
    let place = machine_read::source(&Element::new("disk").with("type", kind).child(source))?;
    match place {
        Some(Source::Volume { pool, volume }) => Ok(Some((pool, volume))),
        _ => Err(refuse("target: a disk is backed up to a volume of a pool: the path /karst/POOL/NAME")),
    }
}

fn disk(e: &Element, pull: bool) -> Result<Option<NewDisk>, VirError> {
    let name = e.attribute("name").filter(|n| !n.is_empty());
    let name = name.ok_or_else(|| wrong("missing name from disk backup element"))?.to_owned();
    match e.attribute("backup").unwrap_or("yes") {
        "yes" => {}
        "no" => return Ok(None),
        other => return Err(wrong(format!("invalid disk 'backup' state '{other}'"))),
    }
    let attribute = |name: &str| e.attribute(name).map(str::to_owned);
    let since = match (e.attribute("backupmode"), attribute("incremental")) {
        (Some("full"), None) => Some(Since::Whole),
        (Some("full"), Some(_)) => {
            return Err(wrong(format!("'incremental' of disk '{name}' needs backupmode='incremental'")));
        }
        (None | Some("incremental"), Some(since)) => Some(Since::Checkpoint(since)),
        (None | Some("incremental"), None) => None,
        (Some(other), _) => return Err(wrong(format!("invalid disk 'backupmode' '{other}'"))),
    };
    let (export, bitmap) = (attribute("exportname"), attribute("exportbitmap"));
    if !pull && (export.is_some() || bitmap.is_some()) {
        return Err(wrong("use of 'exportname' and 'exportbitmap' requires pull mode backup"));
    }
    if pull && e.find("target").is_some() {
        return Err(wrong("use of 'target' requires push mode backup; a pull has a 'scratch'"));
    }
    if e.find("scratch").is_some_and(|s| s.attributes().next().is_some()) {
        let text = "scratch: what the guest overwrites is kept beside the disk, in a place of the pool's own; leave it out";
        return Err(refuse(text));
    }
    // Said of the disk, of what it is written to, or of what is kept meanwhile.
    let places = [Some(e), e.find("target"), e.find("scratch")];
    if places.into_iter().flatten().any(|place| place.find(encryption::NAME).is_some()) {
        let name = encryption::NAME;
        return Err(refuse(format!("{name}: what a backup writes is not encrypted; leave it out")));
    }
    match e.find("driver").and_then(|d| d.attribute("type")) {
        None | Some("raw") => {}
        Some(other) => {
            return Err(refuse(format!(
                "driver: '{other}' is not there: a volume that a disk is backed up to is raw"
            )));
        }
    }
    let target = if pull { None } else { target(e)? };
    Ok(Some(NewDisk { name, since, target, export, bitmap }))
}

/// Reads the document of a backup.
///
/// # Errors
/// XML error; CONFIG_UNSUPPORTED, naming the element, for what Karst does not do.
pub fn read(text: &str) -> Result<NewBackup, VirError> {
    let root = super::read::document(text)?;
    if root.name() != "domainbackup" {
        let text = format!("unexpected root element <{}>, expecting <domainbackup>", root.name());
        return Err(wrong(text));
    }
    let pull = match root.attribute("mode").unwrap_or("push") {
        "push" => false,
        "pull" => true,
        other => return Err(wrong(format!("unknown backup mode '{other}'"))),
    };
    let listen = match (root.find("server"), pull) {
        (None, false) => None,
        (None, true) => Some(BackupListen::Unix),
        (Some(e), true) => Some(server(e)?),
        (Some(_), false) => return Err(wrong("use of <server> requires pull mode backup")),
    };
    let since = root.find("incremental").map(|e| e.body().trim()).filter(|t| !t.is_empty());
    let mut disks = vec![];
    for e in root.find("disks").into_iter().flat_map(|d| d.all("disk")) {
        let Some(new) = disk(e, pull)? else { continue };
        if disks.iter().any(|d: &NewDisk| d.name == new.name) {
            return Err(wrong(format!("backup for disk '{}' is there twice", new.name)));
        }
        disks.push(new);
    }
    let said = root.find("disks").is_some_and(|d| !d.elements().is_empty());
    if said && disks.is_empty() {
        return Err(wrong("at least one disk must be backed up"));
    }
    Ok(NewBackup { since: since.map(str::to_owned), listen, disks: said.then_some(disks) })
}

/// The document of a backup that goes on; `targets` are the domain's disks in libvirt's words, with the devices that they are.
pub fn document(view: &DiskBackupView, targets: &[(String, String)]) -> String {
    let pull = view.listen.is_some();
    let mut e = Element::new("domainbackup").with("mode", if pull { "pull" } else { "push" });
    let mut all = view.disks.iter().map(|d| d.since.as_deref());
    // Of all disks the same.
    if let Some(Some(first)) = all.next()
        && all.all(|since| since == Some(first))
    {
        e.push(Element::text("incremental", first));
    }
    match view.listen {
        Some(BackupListen::Unix) => e.push(
            Element::new("server").with("transport", "unix").with_some("socket", view.state.socket.as_ref()),
        ),
        Some(BackupListen::Tcp { address }) => e.push(
            Element::new("server")
                .with("transport", "tcp")
                .with("name", address.ip())
                .with("port", address.port()),
        ),
        None => {}
    }
    let mut disks = Element::new("disks");
    for (n, (target, device)) in targets.iter().enumerate() {
        let Some(disk) = view.disks.iter().find(|d| d.device == *device) else {
            disks.push(Element::new("disk").with("name", target).with("backup", "no"));
            continue;
        };
        let mode = if disk.since.is_some() { "incremental" } else { "full" };
        let mut shown = Element::new("disk")
            .with("name", target)
            .with("backup", "yes")
            .with("type", "file")
            .with("backupmode", mode)
            .with_some("incremental", disk.since.as_ref());
        if pull {
            shown.set("exportname", &disk.export);
            if disk.since.is_some() {
                shown.set("exportbitmap", &disk.bitmap);
            }
        }
        shown.set("index", n + 1);
        if let Some((pool, name)) = &disk.target {
            shown.push(Element::new("driver").with("type", "raw"));
            shown
                .push(Element::new("target").with("file", format!("{}{pool}/{name}", machine_read::VOLUMES)));
        }
        disks.push(shown);
    }
    e.push(disks);
    e.document()
}

#[cfg(test)]
mod tests {
    use super::*;
    use karst_engine::checkpoints::backup::BackupDiskView;
    use karst_model::{OperationId, guest::DiskBackupState};

    #[test]
    fn backups_are_read() {
        let none = NewBackup { since: None, listen: None, disks: None };
        assert_eq!(read("<domainbackup/>"), Ok(none.clone()));
        assert_eq!(read("<domainbackup mode='push'/>"), Ok(none.clone()));
        let unix = NewBackup { listen: Some(BackupListen::Unix), ..none };
        assert_eq!(read("<domainbackup mode='pull'/>"), Ok(unix));
        let text = "<domainbackup mode='pull'><incremental>c1</incremental>\
                    <server transport='tcp' name='localhost' port='10809'/>\
                    <disks><disk name='vda' backup='yes' exportname='a' exportbitmap='b'><scratch/></disk>\
                    <disk name='vdb' backupmode='full'/><disk name='vdc' backup='no'/></disks></domainbackup>";
        let disk =
            |name: &str| NewDisk { name: name.into(), since: None, target: None, export: None, bitmap: None };
        let disks = vec![
            NewDisk { export: Some("a".into()), bitmap: Some("b".into()), ..disk("vda") },
            NewDisk { since: Some(Since::Whole), ..disk("vdb") },
        ];
        let listen = Some(BackupListen::Tcp { address: "127.0.0.1:10809".parse().unwrap() });
        assert_eq!(read(text), Ok(NewBackup { since: Some("c1".into()), listen, disks: Some(disks) }));
        let text = "<domainbackup><disks><disk name='vda' type='file' incremental='c2'><target file='/karst/p/v'/>\
                    <driver type='raw'/></disk></disks></domainbackup>";
        let target = Some(("p".to_owned(), "v".to_owned()));
        let since = Some(Since::Checkpoint("c2".into()));
        assert_eq!(read(text).unwrap().disks, Some(vec![NewDisk { since, target, ..disk("vda") }]));
    }

    #[test]
    fn what_is_not_there_is_named() {
        let pull = |inner: &str| read(&format!("<domainbackup mode='pull'>{inner}</domainbackup>"));
        let push = |inner: &str| read(&format!("<domainbackup>{inner}</domainbackup>"));
        for (e, word) in [
            (pull("<server transport='unix' socket='/etc/x'/>"), "server socket"),
            (pull("<server transport='rdma'/>"), "server transport"),
            (pull("<server name='example.org' port='1'/>"), "server name"),
            (pull("<server port='1' tls='yes'/>"), "server tls"),
            (pull("<server/>"), "port"),
            (pull("<disks><disk name='vda'><scratch file='/x'/></disk></disks>"), "scratch"),
            (push("<disks><disk name='vda'><target file='/srv/x'/></disk></disks>"), "target"),
            (push("<disks><disk name='vda'><driver type='qcow2'/></disk></disks>"), "driver"),
            (
                push(
                    "<disks><disk name='vda'><target file='/karst/p/v'><encryption format='luks'/></target></disk></disks>",
                ),
                "encryption",
            ),
            (
                pull("<disks><disk name='vda'><scratch><encryption format='luks'/></scratch></disk></disks>"),
                "encryption",
            ),
        ] {
            let e = e.unwrap_err();
            assert!(e.code == Code::ConfigUnsupported && e.text.contains(word), "{e:?}");
        }
        for e in [
            push("<server port='1'/>"),
            push("<disks><disk name='vda' exportname='x'/></disks>"),
            push("<disks><disk name='vda'/><disk name='vda'/></disks>"),
            push("<disks><disk name='vda' backup='no'/></disks>"),
            push("<disks><disk/></disks>"),
            pull("<disks><disk name='vda'><target file='/karst/p/v'/></disk></disks>"),
            pull("<server port='x'/>"),
            read("<domainbackup mode='throw'/>"),
            read("<domain/>"),
        ] {
            assert_eq!(e.unwrap_err().code, Code::XmlError);
        }
    }

    #[test]
    fn what_goes_on_is_shown() {
        let disk = BackupDiskView {
            device: "root".into(),
            since: Some("c1".into()),
            target: None,
            export: "vda".into(),
            bitmap: "backup-vda".into(),
        };
        let view = DiskBackupView {
            operation: OperationId(uuid::Uuid::nil()),
            disks: vec![disk.clone()],
            listen: Some(BackupListen::Unix),
            state: DiskBackupState { socket: Some("/run/s".into()), ..Default::default() },
        };
        let targets = [("vda".to_owned(), "root".to_owned()), ("vdb".to_owned(), "data".to_owned())];
        let text = "<domainbackup mode='pull'>\n  <incremental>c1</incremental>\n  <server transport='unix' socket='/run/s'/>\n  \
                    <disks>\n    <disk name='vda' backup='yes' type='file' backupmode='incremental' incremental='c1' \
                    exportname='vda' exportbitmap='backup-vda' index='1'/>\n    <disk name='vdb' backup='no'/>\n  \
                    </disks>\n</domainbackup>\n";
        assert_eq!(document(&view, &targets), text);
        let target = Some(("p".to_owned(), "v".to_owned()));
        let push = DiskBackupView {
            disks: vec![BackupDiskView { since: None, target, ..disk }],
            listen: None,
            ..view
        };
        let text = document(&push, &targets[..1]);
        assert!(text.contains("<target file='/karst/p/v'/>") && text.contains("mode='push'"), "{text}");
        assert!(!text.contains("exportname") && !text.contains("<server"), "{text}");
    }
}
