//! Directories that a machine shares with its host (`<filesystem>`), both ways: devices of the type `disk` with a tag, which the guest
//! mounts itself, or with a path, where Karst's agent mounts them. How they are shared is ADR 58 and ADR 65.
//!
//! An address on PCI that a document wishes for one is kept in it, and followed where the machine has it.

use super::{Opaque, Source, pci_of, read, refuse, write, wrong};
use crate::{error::VirError, xml::Element};
use karst_engine::compute::expand::ParsedDevices;
use karst_model::{
    board::Board,
    device::{
        DISK_BUSES, DiskBus, DiskDevice, DiskOrigin, SHARE_ACCESS, SHARE_CACHES, SHARE_DEVICES, ShareAccess,
        ShareOptions, share_tag, tag_fault,
    },
    instance::DeviceIdentity,
};
use std::collections::BTreeMap;

type Keys = BTreeMap<String, String>;

/// The name of the element.
pub const ELEMENT: &str = "filesystem";
/// Where hosts have the program that serves directories by virtiofs. Which it is is Karst's to know.
const PROGRAMS: [&str; 4] = [
    "/usr/libexec/virtiofsd",
    "/usr/lib/qemu/virtiofsd",
    "/usr/lib/virtiofsd",
    "/usr/local/libexec/virtiofsd",
];

/// The order in which libvirt writes what is in one.
const ORDER: &[&str] = &["driver", "binary", "source", "target", "readonly", "boot", "alias", "address"];

/// A directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filesystem {
    /// What it is on the host.
    pub source: Source,
    /// The name by which the guest mounts it.
    pub tag: String,
    /// How it is shared: by virtiofs or 9p.
    pub bus: DiskBus,
    /// The guest cannot write.
    pub readonly: bool,
    /// What of how it is shared is not as usual.
    pub options: ShareOptions,
    /// Boot order, higher first.
    pub boot: Option<u32>,
    /// Alias that the user gave.
    pub alias: Option<String>,
    /// PCI address.
    pub pci: Option<String>,
}

impl Filesystem {
    /// The same without what it is called and where it is.
    fn bare(&self) -> Self {
        Self { alias: None, pci: None, ..self.clone() }
    }

    /// Is it the same but for what it is called and where it is?
    pub fn is(&self, other: &Self) -> bool {
        self.bare() == other.bare()
    }
}

fn of<T: Copy>(known: &[(&str, T)], name: &str) -> Option<T> {
    known.iter().find(|(word, _)| *word == name).map(|(_, value)| *value)
}

/// One of the words that are there, or nothing when none is said.
fn word<T: Copy>(
    e: &Element,
    attribute: &str,
    label: &str,
    known: &[(&str, T)],
) -> Result<Option<T>, VirError> {
    let Some(text) = e.attribute(attribute) else { return Ok(None) };
    let found = of(known, text);
    found.map(Some).ok_or_else(|| {
        let words: Vec<&str> = known.iter().map(|(word, _)| *word).collect();
        refuse(label, format!("'{text}' is not there; {} are", words.join(", ")))
    })
}

/// Refuses attributes and elements beside those that are known.
fn demand_known(e: &Element, attributes: &[&str], elements: &[&str]) -> Result<(), VirError> {
    let label = |name: &str| match e.name() {
        ELEMENT => format!("{ELEMENT} {name}"),
        inner => format!("{ELEMENT} {inner} {name}"),
    };
    if let Some((name, _)) = e.attributes().find(|(name, _)| !attributes.contains(name)) {
        return Err(refuse(&label(name), "is not there"));
    }
    match e.elements().iter().find(|inner| !elements.contains(&inner.name())) {
        Some(inner) => Err(refuse(&label(inner.name()), why_not(inner.name()))),
        None => Ok(()),
    }
}

fn why_not(element: &str) -> &'static str {
    match element {
        "space_hard_limit" | "space_soft_limit" => "a volume has a size; a directory of the host has none",
        "idmap" => "owners are mapped into the machine's own range of ids",
        _ => "is not there",
    }
}

fn mode(e: &Element, name: &str) -> Result<Option<u16>, VirError> {
    let Some(text) = e.attribute(name) else { return Ok(None) };
    let found = u16::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o777);
    found.map(Some).ok_or_else(|| wrong(format!("invalid {name}: '{text}'")))
}

fn source(e: &Element) -> Result<Source, VirError> {
    let source = e.find("source").ok_or_else(|| wrong("missing source information for a filesystem"))?;
    if source.attribute("socket").is_some() {
        let text = "'socket': who serves a directory is started with the machine, and not found at a socket of the host";
        return Err(refuse("filesystem source", text));
    }
    demand_known(source, &["dir", "pool", "volume"], &[])?;
    let part = |name: &str| source.attribute(name).filter(|v| !v.is_empty());
    match e.attribute("type").unwrap_or("mount") {
        "mount" => {
            let dir = part("dir");
            read::place(
                dir.ok_or_else(|| wrong("missing 'dir' in the source of a filesystem of type mount"))?,
            )
        }
        "volume" => match (part("pool"), part("volume")) {
            (Some(pool), Some(volume)) => {
                Ok(Source::Volume { pool: pool.to_owned(), volume: volume.to_owned() })
            }
            _ => Err(wrong("'pool' and 'volume' are needed in the source of a filesystem of type volume")),
        },
        other => Err(refuse("filesystem type", format!("'{other}' is not there; mount and volume are"))),
    }
}

/// What a `<binary>` says of the program that serves one by virtiofs.
fn binary(e: &Element, options: &mut ShareOptions) -> Result<(), VirError> {
    demand_known(e, &["path", "xattr"], &["cache", "sandbox", "lock", "thread_pool"])?;
    if let Some(path) = e.attribute("path").filter(|path| !PROGRAMS.contains(path)) {
        let text = format!("'{path}': directories are served by the host's virtiofsd; leave the path out");
        return Err(refuse("filesystem binary", text));
    }
    let switches = [("on", true), ("off", false)];
    options.no_attributes = word(e, "xattr", "filesystem binary xattr", &switches)? == Some(false);
    if let Some(cache) = e.find("cache") {
        options.cache = word(cache, "mode", "filesystem binary cache", SHARE_CACHES)?;
    }
    if let Some(sandbox) = e.find("sandbox") {
        // It is in namespaces of its own whatever is said, which is no less.
        word(sandbox, "mode", "filesystem binary sandbox", &[("namespace", ()), ("chroot", ())])?;
    }
    if let Some(lock) = e.find("lock") {
        for name in ["posix", "flock"] {
            if word(lock, name, "filesystem binary lock", &switches)? == Some(true) {
                let text = format!("'{name}': virtiofsd takes no locks on the host for a guest");
                return Err(refuse("filesystem binary lock", text));
            }
        }
    }
    if let Some(size) = e.find("thread_pool").and_then(|pool| pool.attribute("size")) {
        let n: u16 = size
            .parse()
            .map_err(|_| wrong(format!("cannot parse thread pool size '{size}' for virtiofs")))?;
        // Without any it is served by one thread for each queue, as without a word.
        options.threads = Some(n).filter(|n| *n > 0);
    }
    Ok(())
}

/// What a `<filesystem>` says.
///
/// # Errors
/// XML error; CONFIG_UNSUPPORTED, naming the element or attribute.
pub fn read(e: &Element) -> Result<Filesystem, VirError> {
    demand_known(
        e,
        &["type", "accessmode", "fmode", "dmode", "model", "multidevs"],
        &["driver", "source", "target", "readonly", "binary", "boot", "alias", "address"],
    )?;
    let models = [("virtio", ()), ("virtio-non-transitional", ())];
    word(e, "model", "filesystem model", &models)?;
    let none = Element::new("driver");
    let driver = e.find("driver").unwrap_or(&none);
    demand_known(
        driver,
        &["type", "wrpolicy", "queue", "name", "iommu", "ats", "packed", "page_per_vq"],
        &[],
    )?;
    let bus = match driver.attribute("type") {
        None | Some("path") => DiskBus::Plan9,
        Some("virtiofs") => DiskBus::Virtiofs,
        Some(other) => {
            return Err(refuse(
                "filesystem driver",
                format!("'{other}' is not there; path and virtiofs are"),
            ));
        }
    };
    let served = bus == DiskBus::Virtiofs;
    let mut options =
        ShareOptions { virtio: super::options::virtio(Some(driver)), ..ShareOptions::default() };
    options.immediate =
        word(driver, "wrpolicy", "filesystem driver wrpolicy", &[("immediate", ())])?.is_some();
    let access = word(e, "accessmode", "filesystem accessmode", SHARE_ACCESS)?;
    options.devices = match e.attribute("multidevs") {
        Some("default") => None,
        _ => word(e, "multidevs", "filesystem multidevs", SHARE_DEVICES)?,
    };
    (options.file_mode, options.directory_mode) = (mode(e, "fmode")?, mode(e, "dmode")?);
    match served {
        false => options.access = Some(access.unwrap_or(ShareAccess::Passthrough)),
        true if access.is_some_and(|a| a != ShareAccess::Passthrough) => {
            return Err(refuse("filesystem accessmode", "virtiofs only supports passthrough accessmode"));
        }
        true => {}
    }
    if let Some(queue) = driver.attribute("queue") {
        let size =
            queue.parse().map_err(|_| wrong(format!("cannot parse queue size '{queue}' for virtiofs")));
        options.queue_size = Some(size?);
    }
    match e.find("binary") {
        Some(_) if !served => return Err(refuse("filesystem binary", "is of the driver virtiofs")),
        Some(e) => binary(e, &mut options)?,
        None => {}
    }
    // What does not fit together is told in the words of the key.
    if let Some(text) = options.text() {
        ShareOptions::parse("filesystem", &text, Some(bus)).map_err(|e| refuse("filesystem", e.message))?;
    }
    let tag = e.find("target").and_then(|t| t.attribute("dir"));
    let tag = tag.ok_or_else(|| wrong("missing target information for a filesystem"))?.to_owned();
    if let Some(why) = tag_fault(&tag, Some(bus)) {
        return Err(refuse("filesystem target", format!("'{tag}' {why}")));
    }
    let boot = read::own_order(e)?;
    if boot.is_some() && !served {
        return Err(refuse("filesystem boot", "a machine boots from a directory by virtiofs alone"));
    }
    Ok(Filesystem {
        source: source(e)?,
        tag,
        bus,
        readonly: e.find("readonly").is_some(),
        options,
        boot,
        alias: read::alias(e)?,
        pci: e.find("address").and_then(pci_of),
    })
}

/// Is all the memory of a machine of this board shared, so that another process can serve its directories?
pub fn memory_is_shared(board: &Board) -> bool {
    let all = board.memory.is_some_and(|m| m.shared);
    let node = |n: u32| {
        let own = board.numa_memory.iter().find(|(node, _)| *node == n).and_then(|(_, memory)| memory.shared);
        own.unwrap_or(all)
    };
    match board.numa.len() as u32 {
        0 => all,
        cells => (0..cells).all(node),
    }
}

/// Those of a document.
///
/// # Errors
/// XML error; CONFIG_UNSUPPORTED, naming the element, also where one needs memory that is not shared.
pub fn all(devices: &[Element], board: &Board) -> Result<Vec<Filesystem>, VirError> {
    let mut found: Vec<Filesystem> = vec![];
    for e in devices.iter().filter(|e| e.name() == ELEMENT) {
        let one = read(e)?;
        if found.iter().any(|other| other.tag == one.tag) {
            return Err(wrong(format!("target '{}' duplicated for filesystems", one.tag)));
        }
        found.push(one);
    }
    match found.iter().any(|one| one.bus == DiskBus::Virtiofs) && !memory_is_shared(board) {
        true => {
            Err(refuse("memoryBacking", "'virtiofs' requires shared memory; say <access mode='shared'/>"))
        }
        false => Ok(found),
    }
}

/// Is a disk of these keys a directory that is there?
fn is_directory(keys: &Keys) -> bool {
    let key = |name: &str| keys.get(name).map(String::as_str).filter(|v| !v.is_empty());
    let off = key("attached").is_some_and(|a| karst_model::keys::parse_bool("attached", a) == Ok(false));
    let place = key("path").or(key("tag"));
    key("type") == Some("disk") && place.is_some_and(|at| at != "/") && !off
}

/// The tag of a device that is a directory.
pub fn tag_of(name: &str, keys: &Keys, identity: &DeviceIdentity) -> Option<String> {
    let own = keys.get("tag").filter(|tag| !tag.is_empty()).cloned();
    is_directory(keys).then(|| own.unwrap_or_else(|| share_tag(name, &identity.slot)))
}

/// Writes one into the keys of its device; what they say of the path where Karst's agent mounts it stays.
pub fn set(keys: &mut Keys, one: &Filesystem, is_known_by: Option<&str>) {
    let mut set = |key: &str, value: Option<String>| match value {
        Some(value) => drop(keys.insert(key.to_owned(), value)),
        None => drop(keys.remove(key)),
    };
    set("type", Some("disk".into()));
    match &one.source {
        Source::Volume { pool, volume } => {
            set("pool", Some(pool.clone()));
            set("source", Some(volume.clone()));
        }
        Source::Path(path) => {
            set("pool", None);
            set("source", Some(path.clone()));
        }
    }
    if is_known_by != Some(one.tag.as_str()) {
        set("tag", Some(one.tag.clone()));
    }
    let bus = DISK_BUSES.iter().find(|(_, bus)| *bus == one.bus).map(|(name, _)| (*name).to_owned());
    set("io.bus", bus);
    set("readonly", one.readonly.then(|| "true".to_owned()));
    set("share.options", one.options.text());
    set("boot.priority", one.boot.map(|n| n.to_string()));
}

/// What a device of a machine is, in the words of its document; nothing of a drive.
pub fn now(name: &str, device: &DiskDevice, identity: &DeviceIdentity) -> Option<Filesystem> {
    if !device.is_directory() || !device.attached {
        return None;
    }
    let source = match &device.source {
        DiskOrigin::Volume { pool, volume } => Source::Volume { pool: pool.clone(), volume: volume.clone() },
        DiskOrigin::Host { path } => Source::Path(path.clone()),
        // Containers' alone.
        DiskOrigin::Memory { .. } => return None,
    };
    // What is shared in the best way that the host has is shown as it is everywhere.
    let bus = device.io.bus.filter(|bus| *bus == DiskBus::Virtiofs).unwrap_or(DiskBus::Plan9);
    let mut options = device.share.options;
    if bus == DiskBus::Plan9 {
        options.access.get_or_insert(match source {
            Source::Volume { .. } => ShareAccess::Mapped,
            Source::Path(_) => ShareAccess::Squash,
        });
    }
    Some(Filesystem {
        source,
        tag: device.share.tag.clone().unwrap_or_else(|| share_tag(name, &identity.slot)),
        bus,
        readonly: device.readonly,
        options,
        boot: device.boot_priority,
        alias: None,
        pci: None,
    })
}

/// The element of a document that still says what is there.
pub fn kept<'a>(devices: &'a [Element], now: &Filesystem) -> Option<&'a Element> {
    devices.iter().find(|e| e.name() == ELEMENT && read(e).is_ok_and(|said| said.is(now)))
}

/// As an element, without boot order, alias and address.
pub fn shown(one: &Filesystem) -> Element {
    let options = &one.options;
    let served = one.bus == DiskBus::Virtiofs;
    let mut e = Element::new(ELEMENT)
        .with("type", "mount")
        .with("accessmode", options.access.unwrap_or(ShareAccess::Passthrough).as_str())
        .with_some("multidevs", options.devices.map(|d| d.as_str()))
        .with_some("fmode", options.file_mode.map(|m| format!("{m:04o}")))
        .with_some("dmode", options.directory_mode.map(|m| format!("{m:04o}")));
    let mut driver = Element::new("driver")
        .with("type", if served { "virtiofs" } else { "path" })
        .with_some("wrpolicy", options.immediate.then_some("immediate"))
        .with_some("queue", options.queue_size);
    super::options::show_virtio(&mut driver, options.virtio);
    e.push(driver);
    let mut binary = Element::new("binary").with_some("xattr", options.no_attributes.then_some("off"));
    binary.push_some(options.cache.map(|c| Element::new("cache").with("mode", c.as_str())));
    binary.push_some(options.threads.map(|n| Element::new("thread_pool").with("size", n)));
    if binary.attributes().next().is_some() || !binary.elements().is_empty() {
        e.push(binary);
    }
    e.push(Element::new("source").with("dir", one.source.path()));
    e.push(Element::new("target").with("dir", &one.tag));
    if one.readonly {
        e.push(Element::new("readonly"));
    }
    e
}

/// A directory that a machine shares. Of one that runs it is said where it is, else where the document wished it.
pub fn element(
    identity: &DeviceIdentity,
    now: &Filesystem,
    boot: Option<u32>,
    live: bool,
    opaque: &Opaque,
) -> Element {
    let said = kept(&opaque.devices, now);
    let mut e = said.cloned().unwrap_or_else(|| shown(now));
    if said.is_none() {
        e.push_some(boot.map(|order| Element::new("boot").with("order", order)));
    }
    let wish = e.find("address").cloned();
    e.elements_mut().retain(|inner| !matches!(inner.name(), "alias" | "address"));
    write::named(&mut e, identity, live);
    match said {
        Some(_) if !live => e.push_some(wish),
        _ => e.push_some(write::placed(identity)),
    }
    write::sort(&mut e, ORDER);
    e
}

/// Does a directory of these devices need a machine whose memory is shared?
pub fn want_shared_memory(parsed: &ParsedDevices) -> bool {
    let served = |d: &DiskDevice| d.is_directory() && d.attached && d.io.bus == Some(DiskBus::Virtiofs);
    parsed.disks.iter().any(|(_, disk)| served(disk))
}

/// Says in a document that the memory is shared, as that of a machine with such a directory is whatever its keys say.
pub fn show_shared_memory(domain: &mut Element) {
    if domain.find("memoryBacking").is_none() {
        domain.push(Element::new("memoryBacking"));
    }
    for backing in domain.elements_mut().iter_mut().filter(|e| e.name() == "memoryBacking") {
        backing.elements_mut().retain(|e| e.name() != "access");
        backing.push(Element::new("access").with("mode", "shared"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xml::read::document;
    use karst_model::device::Device;

    fn one(text: &str) -> Result<Filesystem, VirError> {
        read(&document(text).unwrap())
    }

    /// Those of libvirt's own documents that are taken, with the keys of their devices.
    const TAKEN: &[(&str, &str)] = &[
        (
            "<filesystem type='mount' accessmode='passthrough'><source dir='/export/fs1'/><target dir='fs1'/></filesystem>",
            "io.bus=9p share.options=access=passthrough source=/export/fs1 tag=fs1 type=disk",
        ),
        (
            "<filesystem accessmode='mapped'><driver type='path' wrpolicy='immediate'/><source dir='/export/to/guest2'/>\
             <target dir='/import/from/host2'/></filesystem>",
            "io.bus=9p share.options=immediate,access=mapped source=/export/to/guest2 tag=/import/from/host2 type=disk",
        ),
        (
            "<filesystem type='mount' accessmode='mapped' fmode='0640' dmode='0750' multidevs='forbid'><source dir='/karst/p/v'/>\
             <target dir='fs2'/><readonly/></filesystem>",
            "io.bus=9p pool=p readonly=true share.options=access=mapped,file-mode=0640,directory-mode=0750,devices=forbid source=v tag=fs2 \
             type=disk",
        ),
        (
            "<filesystem type='mount' accessmode='squash' model='virtio-non-transitional'><driver iommu='on' ats='on' packed='on' \
             page_per_vq='on'/><source dir='/export/fs1'/><target dir='fs1'/></filesystem>",
            "io.bus=9p share.options=iommu,ats,packed,page-per-queue,access=squash source=/export/fs1 tag=fs1 type=disk",
        ),
        (
            "<filesystem type='mount' accessmode='passthrough'><driver type='virtiofs' queue='1024'/><binary path='/usr/libexec/virtiofsd' \
             xattr='on'><cache mode='always'/><sandbox mode='chroot'/><lock posix='off' flock='off'/><thread_pool size='16'/></binary>\
             <source dir='/path'/><target dir='mount_tag'/><boot order='2'/></filesystem>",
            "boot.priority=998 io.bus=virtiofs share.options=queue-size=1024,cache=always,threads=16 source=/path tag=mount_tag type=disk",
        ),
        (
            "<filesystem type='volume'><driver type='virtiofs'/><binary xattr='off'/><source pool='p' volume='v'/><target dir='t'/></filesystem>",
            "io.bus=virtiofs pool=p share.options=attributes=off source=v tag=t type=disk",
        ),
    ];

    fn identity(slot: &str) -> DeviceIdentity {
        DeviceIdentity {
            id: karst_model::DeviceId(uuid::Uuid::nil()),
            alias: slot.to_owned(),
            slot: slot.to_owned(),
            pci: None,
            mac: None,
            host_interface: None,
            volume: None,
        }
    }

    #[test]
    fn documents_become_devices_and_are_shown_in_the_same_meaning() {
        for (text, wanted) in TAKEN {
            let said = one(text).unwrap();
            let mut keys = Keys::new();
            set(&mut keys, &said, None);
            let line: Vec<String> = keys.iter().map(|(k, v)| format!("{k}={v}")).collect();
            assert_eq!(line.join(" "), *wanted, "{text}");
            let Ok(Device::Disk(device)) = Device::parse("filesystem0", &keys) else { panic!("{keys:?}") };
            let found = now("filesystem0", &device, &identity("fs0")).unwrap();
            assert!(found.is(&said), "{found:?} {said:?}");
            assert_eq!(tag_of("filesystem0", &keys, &identity("fs0")).as_deref(), Some(said.tag.as_str()));
            // As it was written, and as it is made anew.
            let written = [document(text).unwrap()];
            assert_eq!(kept(&written, &found), Some(&written[0]));
            let again = read(&shown(&found)).unwrap();
            assert_eq!(Filesystem { boot: said.boot, ..again.bare() }, said.bare(), "{text}");
            let other = Filesystem { readonly: !said.readonly, ..said };
            assert_eq!(kept(&written, &other), None);
        }
    }

    #[test]
    fn what_is_mounted_inside_is_shown_by_its_tag_and_stays_there() {
        let all = [("type", "disk"), ("source", "v"), ("pool", "p"), ("path", "/mnt/data")];
        let mut keys: Keys = all.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
        let Ok(Device::Disk(device)) = Device::parse("data", &keys) else { panic!("{keys:?}") };
        let mut found = now("data", &device, &identity("fs1")).unwrap();
        assert_eq!((found.tag.as_str(), found.bus), ("data", DiskBus::Plan9));
        found.readonly = true;
        set(&mut keys, &found, Some("data"));
        assert_eq!((keys.get("path").map(String::as_str), keys.get("tag")), (Some("/mnt/data"), None));
        let root = [("type", "disk"), ("path", "/")].map(|(k, v)| (k.to_owned(), v.to_owned())).into();
        assert_eq!(tag_of("root", &root, &identity("scsi0")), None);
        let ejected = [("type", "disk"), ("tag", "t"), ("attached", "false")];
        let ejected = ejected.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
        assert_eq!(tag_of("d", &ejected, &identity("fs0")), None);
    }

    #[test]
    fn what_is_not_there_is_named() {
        let with = |attributes: &str, inner: &str| {
            format!("<filesystem {attributes}>{inner}<source dir='/a'/><target dir='t'/></filesystem>")
        };
        for (text, word) in [
            (with("type='file'", ""), "filesystem type: 'file'"),
            (with("type='ram'", ""), "filesystem type: 'ram'"),
            (with("model='virtio-transitional'", ""), "filesystem model: "),
            (with("accessmode='root'", ""), "filesystem accessmode: "),
            (with("multidevs='all'", ""), "filesystem multidevs: "),
            (with("fmode='0640'", ""), "access=mapped"),
            (with("accessmode='mapped' fmode='1777'", ""), "invalid fmode: '1777'"),
            (with("", "<driver type='handle'/>"), "filesystem driver: 'handle'"),
            (with("", "<driver type='path' format='raw'/>"), "filesystem driver format: "),
            (with("", "<driver type='path' queue='64'/>"), "io.bus=virtiofs"),
            (with("accessmode='mapped'", "<driver type='virtiofs'/>"), "filesystem accessmode: "),
            (with("multidevs='remap'", "<driver type='virtiofs'/>"), "io.bus=9p"),
            (with("", "<driver type='virtiofs' queue='1000'/>"), "power of two"),
            (with("", "<binary xattr='on'/>"), "filesystem binary: "),
            (
                with("", "<driver type='virtiofs'/><binary path='/tmp/mine'/>"),
                "filesystem binary: '/tmp/mine'",
            ),
            (
                with("", "<driver type='virtiofs'/><binary><sandbox mode='none'/></binary>"),
                "filesystem binary sandbox: ",
            ),
            (
                with("", "<driver type='virtiofs'/><binary><lock posix='on'/></binary>"),
                "filesystem binary lock: ",
            ),
            (
                with("", "<driver type='virtiofs'/><binary><cache mode='auto'/></binary>"),
                "filesystem binary cache: ",
            ),
            (
                with("", "<driver type='virtiofs'/><binary><openfiles max='5'/></binary>"),
                "filesystem binary openfiles: ",
            ),
            (with("", "<idmap/>"), "filesystem idmap: owners"),
            (with("", "<space_hard_limit>5</space_hard_limit>"), "filesystem space_hard_limit: "),
            (with("", "<boot order='1'/>"), "filesystem boot: "),
            (
                "<filesystem><source socket='/tmp/sock'/><target dir='t'/></filesystem>".into(),
                "filesystem source: 'socket'",
            ),
            ("<filesystem><source dir='relative'/><target dir='t'/></filesystem>".into(), "absolute path"),
            ("<filesystem><source dir='/a'/></filesystem>".into(), "missing target"),
            ("<filesystem><target dir='t'/></filesystem>".into(), "missing source"),
            (
                "<filesystem><source dir='/a'/><target dir='karst-fs0'/></filesystem>".into(),
                "filesystem target: ",
            ),
        ] {
            let e = one(&text).unwrap_err();
            assert!(e.text.contains(word), "{text}: {}", e.text);
        }
    }

    #[test]
    fn who_serves_a_directory_needs_the_memory() {
        let of = |devices: &str, memory: &str| {
            let text = format!("<domain>{memory}<devices>{devices}</devices></domain>");
            let root = document(&text).unwrap();
            let board = super::super::board::read(&root, 2).unwrap();
            all(root.find("devices").unwrap().elements(), &board).map(|all| all.len()).map_err(|e| e.text)
        };
        let served = "<filesystem><driver type='virtiofs'/><source dir='/a'/><target dir='a'/></filesystem>";
        let plain = "<filesystem><source dir='/b'/><target dir='b'/></filesystem>";
        let shared = "<memoryBacking><access mode='shared'/></memoryBacking>";
        let cell = |access: &str| {
            format!(
                "{shared}<cpu><numa><cell id='0' cpus='0-1' memory='64' unit='MiB' memAccess='{access}'/></numa></cpu>"
            )
        };
        assert_eq!(of(plain, ""), Ok(1));
        assert_eq!(of(&format!("{plain}{served}"), shared), Ok(2));
        assert_eq!(of(served, &cell("shared")), Ok(1));
        for memory in ["", cell("private").as_str()] {
            let e = of(served, memory).unwrap_err();
            assert!(e.starts_with("memoryBacking: 'virtiofs' requires shared memory"), "{e}");
        }
        assert!(of(&format!("{plain}{plain}"), "").unwrap_err().contains("duplicated"));
        // What says so is read as memory that is shared.
        let mut domain = document(&format!(
            "<domain><memoryBacking><nosharepages/></memoryBacking><devices>{served}</devices></domain>"
        ))
        .unwrap();
        show_shared_memory(&mut domain);
        assert!(memory_is_shared(&super::super::board::read(&domain, 1).unwrap()));
    }
}
