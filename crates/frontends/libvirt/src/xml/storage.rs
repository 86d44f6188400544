//! Pools and volumes as XML.

use super::{
    Element,
    encryption::{self, SecretName},
};
use crate::error::{Code, Part, VirError};
use karst_model::{
    encryption::Encryption,
    pool_life::FoundSource,
    storage::{Pool, PoolKind, Usage, Volume, VolumeContent},
};
use uuid::Uuid;

fn bytes(name: &'static str, n: u64) -> Element {
    Element::text(name, n).with("unit", "bytes")
}

/// Where libvirt's tools put what a machine is started with, and the pool that they make of it when they may not write there.
const SCRATCH: (&str, &str) = ("boot-scratch", "/var/lib/libvirt/boot");

/// The target that a pool shows. Tools find the one above by its path, and make another when there is none: so it has that, and
/// lies where all pools do.
fn target(name: &str) -> String {
    if name == SCRATCH.0 { SCRATCH.1.to_owned() } else { format!("/karst/{name}") }
}

/// The document of a pool. Its place on the host is not told: the target is the name under which volumes have their paths.
pub fn pool(pool: &Pool, usage: Usage) -> String {
    let mut source = Element::new("source");
    if pool.kind == PoolKind::Btrfs {
        source.push(Element::new("format").with("type", "btrfs"));
    }
    let kind = KINDS.iter().find(|(_, of)| of.contains(&pool.kind.as_str())).map_or("dir", |(kind, _)| *kind);
    Element::new("pool")
        .with("type", kind)
        .child(Element::text("name", &pool.name))
        .child(Element::text("uuid", pool.id))
        .child(bytes("capacity", usage.total))
        .child(bytes("allocation", usage.used))
        .child(bytes("available", usage.total.saturating_sub(usage.used)))
        .child(source)
        .child(Element::new("target").child(Element::text("path", target(&pool.name))))
        .document()
}

/// Of a volume: the format in which its bytes come and go, where that is not raw. What it is on its host is the pool's affair.
pub const FORMAT: &str = "user.libvirt.format";
/// The only one that is told.
pub const QCOW2: &str = "qcow2";

/// Do the bytes of a volume come and go as an image in the format qcow2? What is encrypted is raw, whatever its key says: its bytes
/// are those that are encrypted.
pub fn is_image(volume: &Volume) -> bool {
    volume.content == VolumeContent::Block
        && volume.encryption().is_none()
        && volume.config.get(FORMAT).is_some_and(|f| f == QCOW2)
}

/// The document of a volume.
pub fn volume(volume: &Volume, name: &str, path: &str, capacity: u64, allocation: u64) -> String {
    let (kind, format) = match volume.content {
        VolumeContent::Block if is_image(volume) => ("file", "qcow2"),
        VolumeContent::Block => ("file", "raw"),
        VolumeContent::Iso => ("file", "iso"),
        VolumeContent::Filesystem => ("dir", "dir"),
    };
    Element::new("volume")
        .with("type", kind)
        .child(Element::text("name", name))
        .child(Element::text("key", volume.id))
        .child(bytes("capacity", capacity))
        .child(bytes("allocation", allocation))
        .child(
            Element::new("target")
                .child(Element::text("path", path))
                .child(Element::new("format").with("type", format))
                .children(volume.encryption().map(encryption::shown)),
        )
        .document()
}

/// libvirt's kinds of pools, with the kinds of Karst that are made by documents of each.
const KINDS: [(&str, &[&str]); 14] = [
    ("dir", &["dir"]),
    ("fs", &["btrfs"]),
    ("netfs", &[]),
    ("logical", &["lvm"]),
    ("disk", &[]),
    ("iscsi", &[]),
    ("iscsi-direct", &[]),
    ("scsi", &[]),
    ("mpath", &[]),
    ("rbd", &[]),
    ("sheepdog", &[]),
    ("gluster", &[]),
    ("zfs", &["zfs"]),
    ("vstorage", &[]),
];

/// Does libvirt know such a kind of pools?
pub fn is_kind(name: &str) -> bool {
    KINDS.iter().any(|(kind, _)| *kind == name)
}

/// The kind of Karst that is made by documents of one of libvirt's kinds.
pub fn kind_of(name: &str) -> Option<PoolKind> {
    let (_, of) = KINDS.iter().find(|(kind, _)| *kind == name)?;
    PoolKind::ALL.iter().copied().find(|kind| of.contains(&kind.as_str()))
}

/// What of a host could become a pool of a kind.
pub fn sources(kind: PoolKind, found: &[FoundSource]) -> String {
    let source = |of: &FoundSource| {
        let devices = of.devices.iter().map(|path| Element::new("device").with("path", path));
        let mut source = Element::new("source").children(devices).child(Element::text("name", &of.name));
        if kind == PoolKind::Lvm {
            source.push(Element::new("format").with("type", "lvm2"));
        }
        source
    };
    Element::new("sources").children(found.iter().map(source)).document()
}

/// What kinds of pools there are on a host that can have those of the kinds `there`, and the formats of volumes in them.
pub fn capabilities(there: &[PoolKind]) -> String {
    let volumes = || {
        let formats = ["raw", "qcow2", "iso", "dir"].iter().map(|f| Element::text("value", f));
        Element::new("volOptions")
            .child(Element::new("defaultFormat").with("type", "raw"))
            .child(Element::new("enum").with("name", "targetFormatType").children(formats))
    };
    let pool = |(kind, of): &(&'static str, &[&str])| {
        let e = Element::new("pool").with("type", kind);
        if there.iter().any(|k| of.contains(&k.as_str())) {
            e.with("supported", "yes").child(volumes())
        } else {
            e.with("supported", "no")
        }
    };
    Element::new("storagepoolCapabilities").children(KINDS.iter().map(pool)).document()
}

/// Bytes of a sector.
const SECTOR: u64 = 512;

/// A volume to make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewVolume {
    /// Name.
    pub name: String,
    /// Bytes, when it says them.
    pub capacity: Option<u64>,
    /// What it holds.
    pub content: VolumeContent,
    /// How it is encrypted.
    pub encryption: Option<(SecretName, Encryption)>,
    /// Its bytes come and go as an image in the format qcow2.
    pub image: bool,
    /// Path of the volume whose content it begins with.
    pub backing: Option<String>,
}

fn refuse(what: &str, why: impl std::fmt::Display) -> VirError {
    VirError::new(Code::ConfigUnsupported, Part::Storage, format!("{what}: {why}"))
}

fn wrong(text: impl Into<String>) -> VirError {
    VirError::new(Code::XmlError, Part::Storage, text)
}

fn name_of(root: &Element) -> Result<String, VirError> {
    let name = root.find("name").map(|n| n.body().trim()).filter(|n| !n.is_empty());
    name.map(str::to_owned).ok_or_else(|| wrong("missing name element"))
}

/// Reads the document of a volume. Its place and what its format has (`features`, `clusterSize`, `compat`) are the pool's affair: what is
/// asked for is a disk, a disc or a tree (`dir`). Of a disk the format says how its bytes come and go. What it is to lie over it begins as. A disc is one by its format `iso`, or by its name:
/// libvirt looks at what was written, and its tools make a plain file and fill it.
///
/// # Errors
/// XML error; CONFIG_UNSUPPORTED, naming the element.
pub fn read_volume(text: &str) -> Result<NewVolume, VirError> {
    let root = super::read::document(text)?;
    if root.name() != "volume" {
        return Err(wrong(format!("unexpected root element <{}>, expecting <volume>", root.name())));
    }
    let target = root.find("target");
    let encryption = target.map(encryption::of_volume).transpose()?.flatten();
    let below = root.find("backingStore").and_then(|b| b.find("path")).map(|p| p.body().trim());
    let backing = below.filter(|path| !path.is_empty()).map(str::to_owned);
    let format = target.and_then(|t| t.find("format")).and_then(|f| f.attribute("type"));
    let name = name_of(&root)?;
    // An older word for what is encrypted.
    let format = format.filter(|format| encryption.is_none() || *format != "luks");
    let content = match format.or(root.attribute("type")) {
        None | Some("raw" | "file") if is_disc(&name) => VolumeContent::Iso,
        None | Some("raw" | "qcow2" | "file" | "block") => VolumeContent::Block,
        Some("iso") => VolumeContent::Iso,
        Some("dir") => VolumeContent::Filesystem,
        Some(other) => {
            return Err(refuse("format", format!("'{other}' is not there; raw, qcow2, iso and dir are")));
        }
    };
    let capacity = root.find("capacity").map(in_bytes).transpose()?;
    // A disk has whole sectors, also one for a file that has not: libvirt rounds the same way.
    let sectors = |n: u64| n.checked_next_multiple_of(SECTOR).unwrap_or(n);
    let capacity = if content == VolumeContent::Block { capacity.map(sectors) } else { capacity };
    if encryption.is_some() && content != VolumeContent::Block {
        return Err(refuse("encryption", "disks are encrypted; discs and directories are not"));
    }
    let image = content == VolumeContent::Block && format == Some(QCOW2);
    if encryption.is_some() && image {
        return Err(refuse("encryption", "what is encrypted is raw; leave the format out, or say raw"));
    }
    Ok(NewVolume { name, capacity, content, encryption, image, backing })
}

fn is_disc(name: &str) -> bool {
    name.len() > 4 && name.get(name.len() - 4..).is_some_and(|end| end.eq_ignore_ascii_case(".iso"))
}

fn in_bytes(e: &Element) -> Result<u64, VirError> {
    let text = e.body().trim();
    let factor: u64 = match e.attribute("unit").unwrap_or("bytes") {
        "b" | "byte" | "bytes" | "B" => 1,
        "KB" => 1000,
        "k" | "K" | "KiB" => 1 << 10,
        "MB" => 1_000_000,
        "M" | "MiB" => 1 << 20,
        "GB" => 1_000_000_000,
        "G" | "GiB" => 1 << 30,
        "TB" => 1_000_000_000_000,
        "T" | "TiB" => 1 << 40,
        unit => return Err(wrong(format!("unknown suffix '{unit}'"))),
    };
    let bytes = text.parse::<u64>().ok().and_then(|n| n.checked_mul(factor));
    bytes.ok_or_else(|| wrong(format!("malformed {} element '{text}'", e.name())))
}

/// A pool to make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewPool {
    /// Name.
    pub name: String,
    /// UUID, when it says one.
    pub uuid: Option<Uuid>,
    /// Incus' name of its kind.
    pub driver: String,
    /// What of the host it is made of; `None`: the host's own directory, or a file in it.
    pub source: Option<String>,
    /// Bytes of that file.
    pub size: Option<u64>,
}

/// Reads the document of a pool.
///
/// # Errors
/// XML error; CONFIG_UNSUPPORTED, naming the element.
pub fn read_pool(text: &str) -> Result<NewPool, VirError> {
    let root = super::read::document(text)?;
    if root.name() != "pool" {
        return Err(wrong(format!("unexpected root element <{}>, expecting <pool>", root.name())));
    }
    let name = name_of(&root)?;
    let uuid = root.find("uuid").map(|u| u.body().trim()).filter(|u| !u.is_empty());
    let uuid = uuid.map(|u| Uuid::parse_str(u).map_err(|_| wrong(format!("malformed uuid element '{u}'"))));
    let path = root.find("target").and_then(|t| t.find("path")).map(|p| p.body().trim()).unwrap_or_default();
    let from = root.find("source");
    let said = |element: &str, attribute: &str| {
        let found = from.and_then(|s| s.find(element)).and_then(|e| e.attribute(attribute));
        found.filter(|v| !v.is_empty()).map(str::to_owned)
    };
    let named = || {
        let found = from.and_then(|s| s.find("name")).map(|n| n.body().trim());
        found.filter(|n| !n.is_empty()).map(str::to_owned)
    };
    let own = path.is_empty() || path == target(&name);
    // Where libvirt has what a pool of its kind holds.
    let usual = |prefix: &str, source: &Option<String>| {
        source.as_ref().is_some_and(|s| path == format!("{prefix}{s}"))
    };
    let (driver, source, placed) = match root.attribute("type") {
        Some("dir") => ("dir", (!own).then(|| path.to_owned()), true),
        Some("fs") => match said("format", "type").as_deref() {
            Some("btrfs") => ("btrfs", said("device", "path"), own),
            other => {
                let format = other.unwrap_or("auto");
                return Err(refuse("source format", format!("'{format}' is not there for a pool; btrfs is")));
            }
        },
        Some("zfs") => {
            let source = named();
            let placed = own || usual("/dev/zvol/", &source);
            ("zfs", source, placed)
        }
        Some("logical") => {
            let source = named();
            let placed = own || usual("/dev/", &source);
            ("lvm", source, placed)
        }
        Some(other) => {
            return Err(refuse(
                "pool type",
                format!("'{other}' is not made this way; dir, fs (btrfs), zfs and logical are"),
            ));
        }
        None => return Err(wrong("missing pool type attribute")),
    };
    if !placed {
        return Err(refuse("target path", format!("a pool lies where its host puts it; leave {path} out")));
    }
    let size = match (driver, &source) {
        // It has the size of what it is made of.
        ("dir", _) | (_, Some(_)) => None,
        _ => root.find("capacity").map(in_bytes).transpose()?.filter(|n| *n > 0),
    };
    Ok(NewPool { name, uuid: uuid.transpose()?, driver: driver.to_owned(), source, size })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_are_read() {
        let read = |inner: &str| read_volume(&format!("<volume>{inner}</volume>"));
        let whole = "<name>v</name><capacity unit='GiB'>2</capacity><target><format type='qcow2'/></target>";
        let content = VolumeContent::Block;
        let volume = NewVolume {
            name: "v".into(),
            capacity: Some(2 << 30),
            content,
            encryption: None,
            image: true,
            backing: None,
        };
        assert_eq!(read(whole), Ok(volume.clone()));
        let on = "<name>v</name><backingStore><path>/karst/p/x</path><format type='raw'/></backingStore>";
        assert_eq!(read(on).unwrap().backing.as_deref(), Some("/karst/p/x"));
        assert_eq!(read("<name>v</name><backingStore/>").unwrap().backing, None);
        // What virt-install asks of a disk.
        let odd = read("<name>k</name><capacity>8247233</capacity>").unwrap();
        assert_eq!(odd.capacity, Some(8_247_296));
        let features = "<compat>1.1</compat><clusterSize>65536</clusterSize><features><lazy_refcounts/></features></target>";
        assert_eq!(read(&whole.replace("</target>", features)), Ok(volume));
        for (inner, content) in [
            ("<name>v</name>", VolumeContent::Block),
            ("<name>v</name><target><format type='iso'/></target>", VolumeContent::Iso),
            ("<name>v.iso</name>", VolumeContent::Iso),
            ("<name>V.ISO</name><target><format type='raw'/></target>", VolumeContent::Iso),
            ("<name>v.iso</name><target><format type='qcow2'/></target>", VolumeContent::Block),
            ("<name>é.iso</name><target><format type='dir'/></target>", VolumeContent::Filesystem),
        ] {
            assert_eq!(read(inner).unwrap().content, content, "{inner}");
        }
        for (inner, code, word) in [
            ("<capacity>1</capacity>", Code::XmlError, "name"),
            ("<name>v</name><capacity>x</capacity>", Code::XmlError, "capacity"),
            ("<name>v</name><capacity unit='EB'>99</capacity>", Code::XmlError, "EB"),
            ("<name>v</name><target><encryption/></target>", Code::XmlError, "encryption"),
            (
                "<name>v</name><target><format type='dir'/><encryption format='luks'><secret type='passphrase' usage='a'/></encryption></target>",
                Code::ConfigUnsupported,
                "disks are encrypted",
            ),
            ("<name>v</name><target><format type='vmdk'/></target>", Code::ConfigUnsupported, "format"),
        ] {
            let e = read(inner).unwrap_err();
            assert!(e.code == code && e.text.contains(word), "{inner}: {e:?}");
        }
    }

    #[test]
    fn what_is_encrypted_is_no_image() {
        let mut one = Volume {
            id: karst_model::VolumeId(Uuid::from_u128(1)),
            pool: karst_model::PoolId(Uuid::from_u128(2)),
            project: karst_model::ProjectId(Uuid::from_u128(3)),
            name: "v".into(),
            content: VolumeContent::Block,
            owner: karst_model::storage::VolumeOwner::Custom,
            description: String::new(),
            size: None,
            config: [(FORMAT.to_owned(), QCOW2.to_owned())].into(),
            spec_version: 1,
            created_at: jiff::Timestamp::UNIX_EPOCH,
            layers: Default::default(),
        };
        assert!(is_image(&one));
        let shown = |one: &Volume| volume(one, "v", "/karst/p/v", 1, 1);
        assert!(shown(&one).contains("<format type='qcow2'/>"), "{}", shown(&one));
        one.config.insert(karst_model::encryption::SECRET.into(), Uuid::from_u128(4).to_string());
        assert!(!is_image(&one));
        assert!(shown(&one).contains("<format type='raw'/>"), "{}", shown(&one));
    }

    #[test]
    fn capabilities_tell_the_kinds_that_documents_make() {
        for there in [&[PoolKind::Dir, PoolKind::Btrfs][..], PoolKind::ALL] {
            let text = capabilities(there);
            for (kind, _) in KINDS {
                let is = text.contains(&format!("<pool type='{kind}' supported='yes'>"));
                let no = text.contains(&format!("<pool type='{kind}' supported='no'/>"));
                let source = "<source><format type='btrfs'/></source>";
                let document = format!("<pool type='{kind}'><name>p</name>{source}</pool>");
                let driver = read_pool(&document).map(|p| p.driver).unwrap_or_default();
                let made = there.iter().any(|k| k.as_str() == driver);
                assert!(is == made && is != no, "{kind}");
            }
        }
        assert!(capabilities(&[PoolKind::Dir]).contains("<pool type='dir' supported='yes'>"));
        for kind in PoolKind::ALL {
            let shown = |usage| {
                let pool = Pool {
                    id: karst_model::PoolId(Uuid::nil()),
                    name: karst_model::Name::parse("name", "p").unwrap(),
                    kind: *kind,
                    description: String::new(),
                    config: Default::default(),
                    life: Default::default(),
                    spec_version: 1,
                };
                super::pool(&pool, usage)
            };
            let read = read_pool(&shown(Usage { total: 10, used: 1, ..Default::default() })).unwrap();
            assert_eq!((read.driver.as_str(), read.source), (kind.as_str(), None));
        }
    }

    #[test]
    fn sources_are_told() {
        let found = FoundSource { name: "vg0".into(), devices: vec!["/dev/sdb".into()] };
        let shown = sources(PoolKind::Lvm, std::slice::from_ref(&found));
        let root = crate::xml::read::document(&shown).unwrap();
        let source = root.find("source").unwrap();
        assert_eq!(source.find("name").unwrap().body(), "vg0");
        assert_eq!(source.find("device").unwrap().attribute("path"), Some("/dev/sdb"));
        assert_eq!(source.find("format").unwrap().attribute("type"), Some("lvm2"));
        assert!(!sources(PoolKind::Zfs, &[found]).contains("format"));
        for (name, kind) in
            [("dir", Some(PoolKind::Dir)), ("zfs", Some(PoolKind::Zfs)), ("rbd", None), ("x", None)]
        {
            assert_eq!(kind_of(name), kind, "{name}");
        }
    }

    #[test]
    fn pools_are_read() {
        let read = |text: &str| read_pool(text);
        let own = read("<pool type='dir'><name>p</name></pool>").unwrap();
        assert_eq!((own.driver.as_str(), own.source), ("dir", None));
        let scratch = "<pool type='dir'><name>boot-scratch</name><target><path>/var/lib/libvirt/boot</path></target></pool>";
        assert_eq!(read(scratch).unwrap().source, None);
        assert!(read(&scratch.replace("boot-scratch", "p")).unwrap().source.is_some());
        let path = "<pool type='dir'><name>p</name><target><path>/srv/p</path></target></pool>";
        assert_eq!(read(path).unwrap().source.as_deref(), Some("/srv/p"));
        let btrfs = |inner: &str| {
            read(&format!("<pool type='fs'><name>p</name><capacity unit='GiB'>5</capacity>{inner}</pool>"))
        };
        let file = btrfs("<source><format type='btrfs'/></source>").unwrap();
        assert_eq!((file.driver.as_str(), file.source, file.size), ("btrfs", None, Some(5 << 30)));
        let disk = btrfs("<source><device path='/dev/vdb'/><format type='btrfs'/></source>").unwrap();
        assert_eq!((disk.source.as_deref(), disk.size), (Some("/dev/vdb"), None));
        let group = "<pool type='logical'><name>p</name><source><name>vg0</name></source><target><path>/dev/vg0</path></target></pool>";
        let group = read(group).unwrap();
        assert_eq!((group.driver.as_str(), group.source.as_deref()), ("lvm", Some("vg0")));
        for (refused, word) in [
            (btrfs(""), "'auto'"),
            (btrfs("<source><format type='ext4'/></source>"), "'ext4'"),
            (btrfs("<source><format type='btrfs'/></source><target><path>/mnt</path></target>"), "/mnt"),
        ] {
            let e = refused.unwrap_err();
            assert!(e.code == Code::ConfigUnsupported && e.text.contains(word), "{e:?}");
        }
        let set =
            read("<pool type='zfs'><name>p</name><source><name>tank/vms</name></source></pool>").unwrap();
        assert_eq!((set.driver.as_str(), set.source.as_deref()), ("zfs", Some("tank/vms")));
        assert_eq!(
            read("<pool type='iscsi'><name>p</name></pool>").unwrap_err().code,
            Code::ConfigUnsupported
        );
        assert_eq!(read("<pool><name>p</name></pool>").unwrap_err().code, Code::XmlError);
    }
}
