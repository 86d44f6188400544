//! Domains by XML: defined, shown, changed, undefined; and what is refused leaves nothing.
#![allow(clippy::disallowed_methods)] // a test tool

use crate::support::{Client, Refused, Server, argument};
use karst_agent::Fault;
use karst_engine::{
    Context,
    compute::{
        create::{CreateInstance, InstanceSource},
        update::UpdateInstance,
    },
    volumes::create::CreateVolume,
};
use karst_frontend_libvirt::{
    error::Code,
    xdr::{Reader, Writer},
    xml::{Element, machine::read, read::document},
};
use karst_model::{Config, access::Principal, instance::InstanceKind, storage::VolumeContent};

const UUID: &str = "c7a5fdbd-edaf-9455-926a-d65c16db1809";

pub async fn volume(server: &Server, name: &str, content: VolumeContent) {
    let config = Config::from([("size".into(), "64MiB".into())]);
    let request = CreateVolume { name: name.into(), content, description: String::new(), config };
    let admin = Context::new(Principal::system());
    let operation = server.engine.volume_create(&admin, "default", "default", request).await.unwrap();
    assert_eq!(operation.ended().await.error, None);
}

pub async fn define(client: &mut Client, xml: &str) -> Result<(), Refused> {
    client
        .call(
            350,
            &argument(|w| {
                w.string(xml).u32(0);
            }),
        )
        .await
        .map(drop)
}

pub async fn dump(client: &mut Client, name: &str, flags: u32) -> String {
    let domain = client.domain(name).await;
    let mut w = Writer::new();
    w.u32(flags);
    let payload = client.call(14, &[domain, w.finish()].concat()).await.unwrap();
    Reader::new(&payload).string().unwrap()
}

/// A whole domain; its parts can be replaced.
pub fn domain(name: &str, changes: &[(&str, &str)]) -> String {
    let text = format!(
        "<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{name}</name><uuid>{UUID}</uuid><title>A title</title><description>Some &lt;text&gt;</description>
  <metadata><app:a xmlns:app='http://example.org/app'><app:b c='d'>e</app:b></app:a></metadata>
  <memory unit='MiB'>256</memory><currentMemory unit='KiB'>131072</currentMemory>
  <vcpu placement='static' current='1'>2</vcpu>
  <os firmware='efi'><type arch='x86_64' machine='q35'>hvm</type><boot dev='cdrom'/><boot dev='hd'/></os>
  <features><acpi/><hyperv mode='custom'><relaxed state='on'/></hyperv></features>
  <cpu mode='custom' match='exact'><model fallback='allow'>qemu64</model><topology sockets='1' dies='1' cores='2' threads='1'/><feature policy='disable' name='lm'/></cpu>
  <clock offset='utc'><timer name='rtc' tickpolicy='catchup'/></clock>
  <devices>
    <disk type='file' device='disk'><driver name='qemu' type='qcow2' cache='none' discard='unmap'/><source file='/karst/default/d1'/><target dev='vda' bus='virtio'/><alias name='ua-first'/><address type='pci' domain='0x0000' bus='0x05' slot='0x00' function='0x0'/></disk>
    <disk type='volume' device='disk'><source pool='default' volume='d2'/><target dev='sdc' bus='scsi'/><readonly/></disk>
    <disk type='file' device='cdrom'><target dev='hdc' bus='ide'/><readonly/></disk>
    <controller type='usb' model='qemu-xhci'/>
    <interface type='network'><mac address='52:54:00:11:22:33'/><source network='karstbr0'/><model type='e1000e'/><filterref filter='clean-traffic'/><bandwidth><inbound average='1000'/></bandwidth></interface>
    <input type='tablet' bus='usb'/>
    <tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>
    <video><model type='virtio' heads='1'/></video>
  </devices>
</domain>"
    );
    changes.iter().fold(text, |text, (from, to)| {
        assert!(text.contains(from), "{from}");
        text.replacen(from, to, 1)
    })
}

pub async fn ready() -> (Server, Client) {
    let server = Server::start().await;
    for name in ["d1", "d2"] {
        volume(&server, name, VolumeContent::Block).await;
    }
    let client = server.open("full", "qemu:///system").await;
    (server, client)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_defined_is_shown_again_in_meaning() {
    let (server, mut client) = ready().await;
    let text = domain("v1", &[]);
    define(&mut client, &text).await.unwrap();
    let shown = dump(&mut client, "v1", 2).await;
    let (given, kept) = (read::machine(&text).unwrap(), read::machine(&shown).unwrap());
    assert_eq!(kept.machine.as_deref().map(|m| m.starts_with("pc-q35-")), Some(true), "{shown}");
    let machine = given.machine.clone();
    // What the platform adds: addresses, and the devices of every machine.
    let same = |m: &karst_frontend_libvirt::xml::machine::Machine| {
        let mut m = karst_frontend_libvirt::xml::machine::Machine { machine: machine.clone(), ..m.clone() };
        // This host has KVM, and uses it.
        m.kvm = false;
        m.opaque = Default::default();
        m.nics.iter_mut().for_each(|n| n.pci = None);
        m
    };
    assert_eq!(same(&kept), same(&given));
    let e = document(&shown).unwrap();
    for name in ["features", "cpu", "clock"] {
        assert_eq!(e.find(name), document(&text).unwrap().find(name), "{name}");
    }
    assert_eq!(e.find("memory").map(Element::body), Some("262144"), "{shown}");
    assert_eq!(e.find("currentMemory").map(Element::body), Some("131072"), "{shown}");
    assert!(shown.contains("<vcpu placement='static' current='1'>2</vcpu>"), "{shown}");
    let devices = e.find("devices").unwrap();
    for name in ["controller", "input", "video", "tpm"] {
        assert_eq!(
            devices.find(name),
            document(&text).unwrap().find("devices").unwrap().find(name),
            "{name}"
        );
    }
    let disk = devices.find("disk").unwrap();
    assert_eq!(disk.find("driver").and_then(|d| d.attribute("discard")), Some("unmap"));
    assert_eq!(devices.all("disk").count(), 3);
    assert!(shown.contains("<app:b c='d'>e</app:b>"), "{shown}");
    assert!(shown.contains("machine='pc-q35-") && shown.contains("<boot dev='cdrom'/>"), "{shown}");
    // Written once more it is the same, letter by letter.
    define(&mut client, &shown).await.unwrap();
    assert_eq!(dump(&mut client, "v1", 2).await, shown);
    // An ordinary instance, whose disk counts as in use.
    let admin = Context::new(Principal::system());
    let view = server.engine.instance(&admin, "default", "v1").unwrap();
    assert_eq!(view.instance.id.to_string(), UUID);
    for (key, value) in [
        ("limits.memory", "131072KiB"),
        ("limits.memory.maximum", "262144KiB"),
        ("limits.cpu", "1"),
        ("limits.cpu.maximum", "2"),
    ] {
        assert_eq!(view.expanded_config.get(key).map(String::as_str), Some(value), "{key}");
    }
    assert_eq!(view.expanded_config.get("hardware.hyperv").map(String::as_str), Some("true"));
    assert_eq!(view.expanded_config.get("hardware.clock"), None);
    assert_eq!(view.instance.identities["vda"].pci.as_deref(), Some("05:00.0"));
    assert_eq!(view.instance.identities["vda"].alias, "ua-first");
    let used = server.engine.volume_delete(&admin, "default", "default", "d1").await.map(drop).unwrap_err();
    assert!(used.message.contains("is used by"), "{used}");
    let other = domain(
        "v2",
        &[(UUID, "c7a5fdbd-edaf-9455-926a-d65c16db1810"), ("52:54:00:11:22:33", "52:54:00:11:22:34")],
    );
    let refused = define(&mut client, &other).await.unwrap_err();
    assert!(refused.1.contains("attached to instance \"v1\""), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drive_of_discs_has_discs_in_it() {
    let (server, mut client) = ready().await;
    volume(&server, "disc", VolumeContent::Iso).await;
    let drive = "<disk type='file' device='cdrom'><target dev='hdc' bus='ide'/><readonly/></disk>";
    let with = |device: &str, volume: &str| {
        format!(
            "<disk type='file' device='{device}'><source file='/karst/default/{volume}'/><target dev='sdd' bus='sata'/></disk>"
        )
    };
    for (device, volume, word) in
        [("cdrom", "d2", "'d2' of sdd is no disc"), ("disk", "disc", "device='cdrom'")]
    {
        let text = domain("v1", &[(drive, with(device, volume).as_str())]);
        let refused = define(&mut client, &text).await.unwrap_err();
        assert!(refused.1.contains(word), "{refused:?}");
    }
    // Of several machines at once.
    let inside = with("cdrom", "disc");
    define(&mut client, &domain("v1", &[(drive, inside.as_str())])).await.unwrap();
    let shown = dump(&mut client, "v1", 2).await;
    assert!(shown.contains("device='cdrom'") && shown.contains("/karst/default/disc"), "{shown}");
    let other = [
        (drive, inside.as_str()),
        (UUID, "c7a5fdbd-edaf-9455-926a-d65c16db1810"),
        ("52:54:00:11:22:33", "52:54:00:11:22:34"),
        ("/karst/default/d1", "/karst/default/d3"),
        ("volume='d2'", "volume='d4'"),
    ];
    for name in ["d3", "d4"] {
        volume(&server, name, VolumeContent::Block).await;
    }
    define(&mut client, &domain("v2", &other)).await.unwrap();
    let admin = Context::new(Principal::system());
    let used = server.engine.volume_delete(&admin, "default", "default", "disc").await.map(drop).unwrap_err();
    assert!(used.message.contains("is used by"), "{used}");
}

/// Whatever Karst shows of a domain it takes back, whoever made that: a domain that could not be read could not be changed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_shown_is_taken_back_whatever_the_bus() {
    let (server, mut client) = ready().await;
    let admin = Context::new(Principal::system());
    for (root, other) in ["virtio-scsi", "virtio-blk", "nvme", "sata"].map(|bus| (bus, "nvme")) {
        let device = |keys: &[(&str, &str)]| {
            keys.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect::<Config>()
        };
        let devices = [
            ("root", device(&[("type", "disk"), ("path", "/"), ("pool", "default"), ("io.bus", root)])),
            ("data", device(&[("type", "disk"), ("pool", "default"), ("source", "d1"), ("io.bus", other)])),
            ("eth0", device(&[("type", "nic"), ("network", "karstbr0"), ("io.bus", "e1000e")])),
        ];
        let request = CreateInstance {
            name: Some("made".into()),
            kind: InstanceKind::VirtualMachine,
            description: String::new(),
            ephemeral: false,
            config: Config::new(),
            devices: devices.map(|(name, keys)| (name.to_owned(), keys)).into(),
            profiles: Some(vec![]),
            source: InstanceSource::None,
            start: false,
            target: None,
            vmid: None,
        };
        let (_, operation) = server.engine.instance_create(&admin, "default", request).await.unwrap();
        assert_eq!(operation.ended().await.error, None, "{root}");
        let before = server.engine.instance(&admin, "default", "made").unwrap();
        let shown = dump(&mut client, "made", 2).await;
        assert!(shown.contains("dev='nvme"), "{root}: {shown}");
        let with = shown.replacen("<vcpu", "<title>new</title><vcpu", 1);
        define(&mut client, &with).await.unwrap_or_else(|e| panic!("{root}: {e:?}\n{shown}"));
        let after = server.engine.instance(&admin, "default", "made").unwrap();
        let buses = |devices: &karst_model::device::Devices| {
            let all = devices.values().filter_map(|d| d.get("io.bus").cloned());
            all.collect::<std::collections::BTreeSet<_>>()
        };
        assert_eq!(buses(&after.expanded_devices), buses(&before.expanded_devices), "{root}");
        assert_eq!(after.instance.identities, before.instance.identities, "{root}");
        let gone = server.engine.instance_delete(&admin, "default", "made").await.unwrap();
        assert_eq!(gone.ended().await.error, None);
    }
}

/// A prefix is a name: it cannot bring elements of its own into the document, nor make that one which nobody reads.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metadata_has_names() {
    let (server, mut client) = ready().await;
    define(&mut client, &domain("v1", &[])).await.unwrap();
    let v1 = client.domain("v1").await;
    let said = |key: &str| {
        let said = argument(|w| {
            w.i32(2).optional(Some("<n>x</n>")).optional(Some(key)).optional(Some("http://x.org/1")).u32(0);
        });
        [v1.clone(), said].concat()
    };
    for key in ["a><injected", "a b", "a:b", "", "1", "xmlns"] {
        let refused = client.call(264, &said(key)).await.unwrap_err();
        assert!(refused.0 == Code::InvalidArg as i32 && refused.1.contains("prefix"), "{key}: {refused:?}");
    }
    client.call(264, &said("app")).await.unwrap();
    // Whoever sets the key otherwise gains as little.
    let admin = Context::new(Principal::system());
    let view = server.engine.instance(&admin, "default", "v1").unwrap();
    let mut config = view.instance.config.clone();
    config.insert("user.libvirt.metadata.http://x.org/2".into(), "a><devices/><a\n<n>x</n>".into());
    let update = UpdateInstance {
        description: view.instance.description.clone(),
        ephemeral: false,
        config,
        devices: view.instance.devices.clone(),
        profiles: vec![],
        if_version: None,
    };
    let operation = server.engine.instance_update(&admin, "default", "v1", update).await.unwrap();
    assert_eq!(operation.ended().await.error, None);
    let shown = dump(&mut client, "v1", 2).await;
    let devices = document(&shown).unwrap().elements().iter().filter(|e| e.name() == "devices").count();
    assert!(devices == 1 && shown.contains("<app:n xmlns:app='http://x.org/1'>"), "{shown}");
    define(&mut client, &shown).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_document_changes_what_it_changes() {
    let (server, mut client) = ready().await;
    define(&mut client, &domain("v1", &[])).await.unwrap();
    let admin = Context::new(Principal::system());
    let before = server.engine.instance(&admin, "default", "v1").unwrap();
    let shown = dump(&mut client, "v1", 2).await;
    let changes = [
        ("<memory unit='KiB'>262144<", "<memory unit='KiB'>524288<"),
        ("A title", "Another"),
        ("<interface type='network'>", "<interface type='network'><link state='down'/>"),
        ("cache='none'", "cache='writeback'"),
    ];
    let edited = changes.iter().fold(shown, |text, (from, to)| {
        assert!(text.contains(from), "{from} in {text}");
        text.replacen(from, to, 1)
    });
    define(&mut client, &edited).await.unwrap();
    let after = server.engine.instance(&admin, "default", "v1").unwrap();
    assert_eq!(after.expanded_config["limits.memory"], "131072KiB");
    assert_eq!(after.expanded_config["limits.memory.maximum"], "524288KiB");
    assert_eq!(after.expanded_devices["vda"]["io.cache"], "writeback");
    assert_eq!(after.expanded_devices["net0"]["connected"], "false");
    assert_eq!(after.instance.identities, before.instance.identities);
    // A disk that is left out goes; the root does not.
    let e = document(&dump(&mut client, "v1", 2).await).unwrap();
    let without = |dev: &str| {
        let mut e = e.clone();
        let devices = e.elements_mut().iter_mut().find(|d| d.name() == "devices").unwrap();
        devices.elements_mut().retain(|d| d.find("target").and_then(|t| t.attribute("dev")) != Some(dev));
        e.document()
    };
    define(&mut client, &without("sdc")).await.unwrap();
    assert!(!server.engine.instance(&admin, "default", "v1").unwrap().expanded_devices.contains_key("sdc"));
    assert_eq!(define(&mut client, &without("vda")).await.unwrap_err().0, Code::ConfigUnsupported as i32);
    // An instance made elsewhere is edited the same way, and keeps what libvirt has no word for.
    server.guest("v2", InstanceKind::VirtualMachine, false).await;
    let shown = dump(&mut client, "v2", 2).await;
    define(&mut client, &shown).await.unwrap();
    let v2 = server.engine.instance(&admin, "default", "v2").unwrap();
    assert!(v2.instance.devices.is_empty() && v2.profiles.len() == 1, "{:?}", v2.instance.devices);
    define(&mut client, &shown.replace("<vcpu placement='static'>1<", "<vcpu placement='static'>2<"))
        .await
        .unwrap();
    let v2 = server.engine.instance(&admin, "default", "v2").unwrap();
    assert_eq!(v2.expanded_config["limits.cpu"], "2");
    // Directories that it shares are shown by their tags, and stay where they are inside.
    volume(&server, "shared", VolumeContent::Filesystem).await;
    let keys = [("type", "disk"), ("pool", "default"), ("source", "shared"), ("path", "/mnt/data")];
    let directory = keys.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
    let mut devices = v2.instance.devices.clone();
    devices.insert("data".into(), directory);
    let with_directory = devices.clone();
    let request = UpdateInstance {
        description: v2.instance.description.clone(),
        ephemeral: false,
        config: v2.instance.config.clone(),
        devices,
        profiles: v2.profiles.iter().map(|p| p.name.to_string()).collect(),
        if_version: None,
    };
    let changed = server.engine.instance_update(&admin, "default", "v2", request).await.unwrap();
    assert_eq!(changed.ended().await.error, None);
    let shown = dump(&mut client, "v2", 2).await;
    assert!(shown.contains("<source dir='/karst/default/shared'/>"), "{shown}");
    assert!(shown.contains("<target dir='data'/>"), "{shown}");
    define(&mut client, &shown).await.unwrap();
    let v2 = server.engine.instance(&admin, "default", "v2").unwrap();
    assert_eq!(v2.instance.devices, with_directory);
}

/// What `virt-install --location` does: it starts a kernel that it has uploaded, writes what comes afterwards, and removes the
/// kernel while the machine runs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kernel_is_used_by_the_record_and_not_by_the_guest_that_it_started() {
    let (server, mut client) = ready().await;
    for name in ["k", "i"] {
        volume(&server, name, VolumeContent::Block).await;
    }
    let admin = Context::new(Principal::system());
    let parts = "<kernel>/karst/default/k</kernel><initrd>/karst/default/i</initrd><cmdline>console=ttyS0 a,b</cmdline>";
    let with = |name: &str, on_reboot: &str| {
        let ends = format!("<on_reboot>{on_reboot}</on_reboot><devices>");
        let system = format!("hvm</type>{parts}");
        domain(name, &[("hvm</type>", system.as_str()), ("<devices>", ends.as_str())])
    };
    // Defined, shown, defined by what is shown.
    define(&mut client, &with("v1", "destroy")).await.unwrap();
    let shown = dump(&mut client, "v1", 2).await;
    assert!(shown.replace("\n    ", "").contains(parts), "{shown}");
    assert!(shown.contains("<on_reboot>destroy</on_reboot>"), "{shown}");
    assert_eq!(read::machine(&shown).unwrap().kernel, read::machine(&with("v1", "destroy")).unwrap().kernel);
    define(&mut client, &shown).await.unwrap();
    assert_eq!(dump(&mut client, "v1", 2).await, shown);
    let view = server.engine.instance(&admin, "default", "v1").unwrap();
    assert_eq!(view.expanded_config["boot.reboot_action"], "stop");
    assert_eq!(view.instance.devices["kernel0"]["initrd"], "i");
    for name in ["k", "i"] {
        let used =
            server.engine.volume_delete(&admin, "default", "default", name).await.map(drop).unwrap_err();
        assert!(used.message.contains("is used by"), "{used}");
    }
    // The record follows a volume that is renamed.
    server.engine.volume_rename(&admin, "default", "default", "i", "i2").await.unwrap();
    assert!(dump(&mut client, "v1", 2).await.contains("<initrd>/karst/default/i2</initrd>"));
    server.engine.volume_rename(&admin, "default", "default", "i2", "i").await.unwrap();
    let v1 = client.domain("v1").await;
    client.call(9, &v1).await.unwrap();
    define(&mut client, &domain("v1", &[])).await.unwrap();
    let (live, later) = (dump(&mut client, "v1", 0).await, dump(&mut client, "v1", 2).await);
    assert!(
        live.contains("<kernel>/karst/default/k</kernel>") && live.contains("<on_reboot>destroy<"),
        "{live}"
    );
    assert!(!later.contains("<kernel>") && later.contains("<on_reboot>restart<"), "{later}");
    for name in ["k", "i"] {
        let gone = server.engine.volume_delete(&admin, "default", "default", name).await.unwrap();
        assert_eq!(gone.ended().await.error, None);
    }
    client.call(12, &v1).await.unwrap();
    assert!(!dump(&mut client, "v1", 0).await.contains("<kernel>"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_refused_is_named_and_leaves_nothing() {
    let (server, mut client) = ready().await;
    let revision = server.settled().await;
    let disk = "<source file='/karst/default/d1'/>";
    for (from, to, code, word) in [
        ("type='qemu' ", "type='lxc' ", Code::ConfigUnsupported, "containers"),
        ("<memory unit='MiB'>256</memory>", "", Code::XmlError, "memory"),
        ("<memory unit='MiB'>256<", "<memory unit='MiB'>much<", Code::XmlError, "memory"),
        (UUID, "c7a5", Code::XmlError, "uuid"),
        ("machine='q35'", "machine='microvm'", Code::ConfigUnsupported, "os machine"),
        ("<type arch='x86_64'", "<dtb>/boot/k</dtb><type arch='x86_64'", Code::ConfigUnsupported, "dtb"),
        (
            "<type arch='x86_64'",
            "<cmdline>quiet</cmdline><type arch='x86_64'",
            Code::ConfigUnsupported,
            "no <kernel>",
        ),
        ("<type arch='x86_64'", "<kernel>k</kernel><type arch='x86_64'", Code::XmlError, "'k'"),
        (
            "<type arch='x86_64'",
            "<kernel>/karst/default/d2</kernel><initrd>/karst/default/none</initrd><type arch='x86_64'",
            Code::NoStorageVol,
            "\"none\" not found",
        ),
        ("bus='virtio'", "bus='sd'", Code::ConfigUnsupported, "disk bus"),
        // What would have no effect.
        ("<os ", "<cputune><quota>2048</quota></cputune><os ", Code::ConfigUnsupported, "cputune"),
        ("<os ", "<memtune><hard_limit>1</hard_limit></memtune><os ", Code::ConfigUnsupported, "memtune"),
        ("offset='utc'", "offset='variable' adjustment='5'", Code::ConfigUnsupported, "clock offset"),
        ("<alias name='ua-first'/>", "<transient/>", Code::ConfigUnsupported, "disk transient"),
        ("placement='static' current='1'", "cpuset='0-'", Code::XmlError, "vcpu cpuset"),
        (
            "<input type='tablet'",
            "<watchdog model='itco'/><input type='tablet'",
            Code::ConfigUnsupported,
            "watchdog",
        ),
        ("type='qcow2'", "type='vmdk'><teleport/></driver><driver", Code::ConfigUnsupported, "disk driver"),
        (disk, "<source file='/karst/default/none'/>", Code::NoStorageVol, "\"none\" not found"),
        (disk, "<source file='/karst/none/d1'/>", Code::NoStoragePool, "\"none\" not found"),
        ("dev='sdc'", "dev='vda'", Code::XmlError, "duplicated"),
        ("network='karstbr0'", "network='none'", Code::NoNetwork, "none"),
        ("interface type='network'", "interface type='mcast'", Code::ConfigUnsupported, "interface type"),
        ("clean-traffic", "mine", Code::ConfigUnsupported, "filterref"),
        ("clean-traffic", "clean-traffic-gateway", Code::ConfigUnsupported, "isolated"),
        (
            "clean-traffic'/>",
            "no-mac-spoofing'><parameter name='MAC' value='x'/></filterref>",
            Code::ConfigUnsupported,
            "MAC",
        ),
        (
            "<controller",
            "<hostdev mode='subsystem' type='pci'/><controller",
            Code::ConfigUnsupported,
            "hostdev",
        ),
        ("<devices>", "<qemu:commandline/><devices>", Code::ConfigUnsupported, "qemu:commandline"),
        ("type='emulator'", "type='passthrough'", Code::ConfigUnsupported, "tpm"),
        ("</domain>", "", Code::XmlError, ""),
        ("<name>v1<", "<name>a/b<", Code::InvalidArg, "name"),
        ("52:54:00", "53:54:00", Code::XmlError, "multicast"),
    ] {
        let refused = define(&mut client, &domain("v1", &[(from, to)])).await.expect_err(to);
        assert!(refused.0 == code as i32 && refused.1.contains(word), "{to}: {refused:?}");
    }
    assert_eq!(server.engine.inner().inventory.read().revision, revision);
    assert!(client.names().await.is_empty());
    // A name and a UUID of two are a mistake.
    define(&mut client, &domain("v1", &[])).await.unwrap();
    let other = domain("v1", &[(UUID, "c7a5fdbd-edaf-9455-926a-d65c16db1811")]);
    assert!(define(&mut client, &other).await.unwrap_err().1.contains("already exists with uuid"));
    assert!(
        define(&mut client, &domain("v2", &[])).await.unwrap_err().1.contains("already defined with uuid")
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn undefining_leaves_the_disks() {
    let (server, mut client) = ready().await;
    define(&mut client, &domain("v1", &[])).await.unwrap();
    let v1 = client.domain("v1").await;
    client.call(9, &v1).await.unwrap();
    // It runs on as a transient one, and goes when it ends.
    client.call(35, &v1).await.unwrap();
    let persistent = client.call(151, &v1).await.unwrap();
    assert_eq!(persistent, [0; 4]);
    client.call(12, &v1).await.unwrap();
    for _ in 0..200 {
        if client.names().await.is_empty() {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    assert!(client.names().await.is_empty());
    let admin = Context::new(Principal::system());
    for name in ["d1", "d2"] {
        server.engine.custom_volume(&admin, "default", "default", name).unwrap();
    }
    // The same UUID again, transient from its beginning.
    let xml = domain("v1", &[]);
    client
        .call(
            10,
            &argument(|w| {
                w.string(&xml).u32(0);
            }),
        )
        .await
        .unwrap();
    let v1 = client.domain("v1").await;
    assert_eq!(client.state(&v1).await.0, 1);
    assert_eq!(client.call(35, &v1).await.unwrap_err().0, Code::OperationInvalid as i32);
    // Of an instance made elsewhere the disk becomes a volume of its own name.
    server.guest("v2", InstanceKind::VirtualMachine, false).await;
    let root = server.engine.instance(&admin, "default", "v2").unwrap().instance.root;
    let v2 = client.domain("v2").await;
    client.call(35, &v2).await.unwrap();
    let kept = server.engine.custom_volume(&admin, "default", "default", "v2").unwrap();
    assert_eq!(kept.id, root);
    let operation = server.engine.volume_delete(&admin, "default", "default", "v2").await.unwrap();
    assert_eq!(operation.ended().await.error, None);
}

/// The size of a volume and what it is called, made and changed over the protocol.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn volumes_are_made_copied_grown_and_deleted() {
    let server = Server::start().await;
    let mut client = server.open("full", "qemu:///system").await;
    let pool = client
        .call(
            84,
            &argument(|w| {
                w.string("default");
            }),
        )
        .await
        .unwrap();
    let xml = "<volume><name>disk.qcow2</name><capacity unit='MiB'>64</capacity><target><format type='qcow2'/></target></volume>";
    let create = [
        pool.clone(),
        argument(|w| {
            w.string(xml).u32(0);
        }),
    ]
    .concat();
    let first = client.call(93, &create).await.unwrap();
    let again = client.call(93, &create).await.unwrap_err();
    assert_eq!(again, (Code::StorageVolExist as i32, "storage volume 'disk.qcow2' exists already".into()));
    let size = async |client: &mut Client, volume: &[u8]| {
        let info = client.call(98, volume).await.unwrap();
        let mut r = Reader::new(&info);
        r.i32().unwrap();
        r.u64().unwrap()
    };
    assert_eq!(size(&mut client, &first).await, 64 << 20);
    let xml = "<volume><name>copy</name><capacity>1048576</capacity></volume>";
    let mut w = Writer::new();
    w.string(xml);
    let from = [pool, w.finish(), first.clone(), vec![0; 4]].concat();
    let second = client.call(125, &from).await.unwrap();
    assert_eq!(size(&mut client, &second).await, 64 << 20);
    let resize = |to: u64, flags: u32| {
        [
            second.clone(),
            argument(|w| {
                w.u64(to).u32(flags);
            }),
        ]
        .concat()
    };
    client.call(260, &resize(128 << 20, 0)).await.unwrap();
    client.call(260, &resize(32 << 20, 2)).await.unwrap();
    assert_eq!(size(&mut client, &second).await, 160 << 20);
    for (to, flags) in [(1 << 20, 0), (1 << 20, 4), (200 << 20, 2 | 4), (u64::MAX, 2)] {
        client.call(260, &resize(to, flags)).await.unwrap_err();
    }
    assert_eq!(size(&mut client, &second).await, 160 << 20);
    // What an instance owns is changed by it.
    server.guest("v1", InstanceKind::VirtualMachine, false).await;
    let root = client
        .call(
            97,
            &argument(|w| {
                w.string("/karst/default/instances/v1");
            }),
        )
        .await
        .unwrap();
    let refused = client.call(94, &[root, vec![0; 4]].concat()).await.unwrap_err();
    assert!(refused.1.contains("part of the domain"), "{refused:?}");
    for volume in [first, second] {
        client.call(94, &[volume.clone(), vec![0; 4]].concat()).await.unwrap();
        assert_eq!(client.call(98, &volume).await.unwrap_err().0, Code::NoStorageVol as i32);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn devices_come_and_go_live_and_configured() {
    let (server, mut client) = ready().await;
    volume(&server, "d3", VolumeContent::Block).await;
    volume(&server, "d4", VolumeContent::Block).await;
    define(&mut client, &domain("v1", &[])).await.unwrap();
    let v1 = client.domain("v1").await;
    let disk = "<disk type='block' device='disk'><source dev='/karst/default/d3'/><target dev='vdb' bus='virtio'/></disk>";
    let device = |xml: &str, flags: u32| {
        [
            v1.clone(),
            argument(|w| {
                w.string(xml).u32(flags);
            }),
        ]
        .concat()
    };
    // Live needs a guest that runs.
    assert_eq!(client.call(160, &device(disk, 1)).await.unwrap_err().0, Code::OperationInvalid as i32);
    client.call(9, &v1).await.unwrap();
    let has = |text: &str| text.contains("dev='vdb'");
    client.call(160, &device(disk, 2)).await.unwrap();
    assert!(!has(&dump(&mut client, "v1", 0).await) && has(&dump(&mut client, "v1", 2).await));
    let twice = client.call(160, &device(disk, 2)).await.unwrap_err();
    assert!(twice.1.contains("target vdb already exists"), "{twice:?}");
    client.call(161, &device(disk, 2)).await.unwrap();
    assert!(!has(&dump(&mut client, "v1", 2).await));
    client.call(160, &device(disk, 3)).await.unwrap();
    let far = disk.replace("d3", "d4").replace("'vdb' bus='virtio'", "'sdf' bus='scsi'");
    client.call(160, &device(&far, 3)).await.unwrap();
    assert!(dump(&mut client, "v1", 2).await.contains("dev='sdf'"));
    client.call(161, &device(&far, 3)).await.unwrap();
    assert!(has(&dump(&mut client, "v1", 0).await) && has(&dump(&mut client, "v1", 2).await));
    // A running guest has it until it gives it back, whatever its record says.
    client.call(161, &device(disk, 2)).await.unwrap();
    let admin = Context::new(Principal::system());
    let used = server.engine.volume_delete(&admin, "default", "default", "d3").await.map(drop).unwrap_err();
    assert!(used.message.contains("is used by"), "{used}");
    client.call(12, &v1).await.unwrap();
    let free = server.engine.volume_delete(&admin, "default", "default", "d3").await.unwrap();
    assert_eq!(free.ended().await.error, None);
    // The cable, by the document of the interface.
    let nic = "<interface type='network'><mac address='52:54:00:11:22:33'/><source network='karstbr0'/><model type='e1000e'/><link state='down'/></interface>";
    client.call(174, &device(nic, 2)).await.unwrap();
    assert!(dump(&mut client, "v1", 2).await.contains("<link state='down'/>"));
    let wrong = nic.replace("11:22:33", "11:22:44");
    assert_eq!(client.call(174, &device(&wrong, 2)).await.unwrap_err().0, Code::DeviceMissing as i32);
    assert_eq!(
        client.call(160, &device("<hostdev/>", 2)).await.unwrap_err().0,
        Code::ConfigUnsupported as i32
    );
    // Sizes.
    client
        .call(
            204,
            &[
                v1.clone(),
                argument(|w| {
                    w.u64(524_288).u32(2 | 4);
                }),
            ]
            .concat(),
        )
        .await
        .unwrap();
    client
        .call(
            199,
            &[
                v1.clone(),
                argument(|w| {
                    w.u32(2).u32(2);
                }),
            ]
            .concat(),
        )
        .await
        .unwrap();
    let shown = read::machine(&dump(&mut client, "v1", 2).await).unwrap();
    assert_eq!((shown.memory, shown.cpus), (524_288, 2));
    assert_eq!(
        client.call(30, &[v1.clone(), vec![0; 8]].concat()).await.unwrap_err().0,
        Code::InvalidArg as i32
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn snapshots_are_a_tree() {
    let (_server, mut client) = ready().await;
    define(&mut client, &domain("v1", &[])).await.unwrap();
    let v1 = client.domain("v1").await;
    let create = |name: &str| {
        let xml = format!("<domainsnapshot><name>{name}</name></domainsnapshot>");
        [
            v1.clone(),
            argument(|w| {
                w.string(&xml).u32(0);
            }),
        ]
        .concat()
    };
    let mut all = vec![];
    for name in ["s1", "s2", "s3"] {
        all.push(client.call(185, &create(name)).await.unwrap());
    }
    let flagged = |of: &[u8], flags: u32| {
        [
            of.to_vec(),
            argument(|w| {
                w.u32(flags);
            }),
        ]
        .concat()
    };
    let count = async |client: &mut Client, flags: u32| {
        let answer = client.call(187, &flagged(&v1, flags)).await.unwrap();
        Reader::new(&answer).i32().unwrap()
    };
    assert_eq!(
        (count(&mut client, 0).await, count(&mut client, 1).await, count(&mut client, 4).await),
        (3, 1, 1)
    );
    assert_eq!(client.call(244, &flagged(&all[2], 0)).await.unwrap(), all[1]);
    assert_eq!(client.call(191, &flagged(&v1, 0)).await.unwrap(), all[2]);
    let xml = client.call(186, &flagged(&all[1], 0)).await.unwrap();
    let xml = Reader::new(&xml).string().unwrap();
    assert!(xml.contains("<parent>\n    <name>s1</name>") && xml.contains("<domain type='"), "{xml}");
    // Another description is all that its document may get; as virsh sends what somebody edited.
    let redefine = async |client: &mut Client, xml: &str, flags: u32| {
        let said = argument(|w| {
            w.string(xml).u32(1 | flags);
        });
        client.call(185, &[v1.clone(), said].concat()).await
    };
    let edited = xml.replacen("</name>", "</name>\n  <description>of &lt;mine&gt;</description>", 1);
    assert_eq!(redefine(&mut client, &edited, 0).await.unwrap(), all[1]);
    let shown = client.call(186, &flagged(&all[1], 0)).await.unwrap();
    assert_eq!(Reader::new(&shown).string().unwrap(), edited);
    let unsupported = Code::OperationUnsupported as i32;
    for (xml, flags, code, word) in [
        (xml.replacen("s2", "new", 1), 0, unsupported, "no snapshot 'new'"),
        (edited.clone(), 2, unsupported, "snapshot-revert"),
        (edited.replace("shutoff", "running"), 0, Code::ConfigUnsupported as i32, "state: "),
        (edited.clone(), 4, Code::InvalidArg as i32, "flags"),
        ("<domainsnapshot/>".to_owned(), 0, Code::XmlError as i32, "must have a name"),
        (edited.replace("of &lt;mine&gt;", &"x".repeat(65537)), 0, Code::InvalidArg as i32, "description"),
    ] {
        let refused = redefine(&mut client, &xml, flags).await.unwrap_err();
        assert!(refused.0 == code && refused.1.contains(word), "{word}: {refused:?}");
    }
    let shown = client.call(186, &flagged(&all[1], 0)).await.unwrap();
    assert_eq!(Reader::new(&shown).string().unwrap(), edited, "what was refused has changed nothing");
    // Without it there is none any more; the current one may be said to be so.
    assert_eq!(redefine(&mut client, &xml, 0).await.unwrap(), all[1]);
    let last = client.call(186, &flagged(&all[2], 0)).await.unwrap();
    assert_eq!(redefine(&mut client, &Reader::new(&last).string().unwrap(), 2).await.unwrap(), all[2]);
    assert_eq!(count(&mut client, 0).await, 3);
    client.call(192, &flagged(&all[0], 0)).await.unwrap();
    assert_eq!(client.call(191, &flagged(&v1, 0)).await.unwrap(), all[0]);
    // What a disk is to go on in is not there before.
    let reuse = [
        v1.clone(),
        argument(|w| {
            w.string("<domainsnapshot/>").u32(16 | 32);
        }),
    ]
    .concat();
    let refused = client.call(185, &reuse).await.unwrap_err();
    assert!(
        refused.0 == Code::OperationUnsupported as i32 && refused.1.contains("by its pool"),
        "{refused:?}"
    );
    // Nobody is inside a domain that is off; with memory there is nothing to be still for.
    for (xml, text) in [
        ("<domainsnapshot/>", "not running"),
        ("<domainsnapshot><memory snapshot='internal'/></domainsnapshot>", "memory"),
    ] {
        let still = argument(|w| {
            w.string(xml).u32(64);
        });
        let refused = client.call(185, &[v1.clone(), still].concat()).await.unwrap_err();
        assert!(refused.1.contains(text), "{refused:?}");
    }
    // A domain with snapshots is not undefined by the way.
    let refused = client.call(231, &flagged(&v1, 4)).await.unwrap_err();
    assert!(refused.1.contains("3 snapshots"), "{refused:?}");
    client.call(193, &flagged(&all[1], 1)).await.unwrap();
    assert_eq!(count(&mut client, 0).await, 1);
    client.call(231, &flagged(&v1, 2 | 4)).await.unwrap();
    assert!(client.names().await.is_empty());
}

/// What is gone of a tree cannot be brought back: who deletes it is told how much that is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_a_tree_is_told() {
    const DELETE: i32 = 193;
    const CHILDREN: u32 = 1;
    let server = Server::start().await;
    server.guest("v1", InstanceKind::VirtualMachine, false).await;
    let mut client = server.open("full", "qemu:///system").await;
    let v1 = client.domain("v1").await;
    let mut all = vec![];
    for name in ["s1", "s2", "s3"] {
        let xml = format!("<domainsnapshot><name>{name}</name></domainsnapshot>");
        let create = argument(|w| {
            w.string(&xml).u32(0);
        });
        all.push(client.call(185, &[v1.clone(), create].concat()).await.unwrap());
    }
    // The last descendant goes; the next does not, however often that is tried.
    server.host.inject("volume_snapshot_delete", Fault::Delay(std::time::Duration::ZERO));
    for _ in 0..6 {
        let e = karst_model::Error::unavailable("the pool does not answer");
        server.host.inject("volume_snapshot_delete", Fault::FailBefore(e));
    }
    let of = [all[0].clone(), CHILDREN.to_be_bytes().to_vec()].concat();
    let refused = client.call(DELETE, &of).await.unwrap_err();
    assert!(refused.1.contains("the pool does not answer"), "{refused:?}");
    assert!(refused.1.ends_with("; deleted are 's3', not 's2', 's1'"), "{refused:?}");
    assert_eq!(server.host.faults_left(), 0);
    // What is left is a tree, and goes when it is asked for again.
    client.call(DELETE, &of).await.unwrap();
    let count = client.call(187, &[v1, vec![0; 4]].concat()).await.unwrap();
    assert_eq!(Reader::new(&count).i32().unwrap(), 0);
}

/// Documents say sizes: a share of the host's memory is shown as what it is, and stays one until somebody sets a size.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_share_of_the_hosts_memory_is_shown_as_a_size() {
    let server = Server::start().await;
    server.settled().await;
    server.guest("v1", InstanceKind::VirtualMachine, false).await;
    let mut client = server.open("full", "qemu:///system").await;
    let admin = Context::new(Principal::system());
    let view = server.engine.instance(&admin, "default", "v1").unwrap();
    let mut config = view.instance.config.clone();
    config.insert("limits.memory".into(), "25%".into());
    let update = UpdateInstance {
        description: view.instance.description.clone(),
        ephemeral: false,
        config,
        devices: view.instance.devices.clone(),
        profiles: view.profiles.iter().map(|p| p.name.to_string()).collect(),
        if_version: None,
    };
    let operation = server.engine.instance_update(&admin, "default", "v1", update).await.unwrap();
    assert_eq!(operation.ended().await.error, None);
    // Of its next start; the simulated host has 64 GiB.
    let shown = dump(&mut client, "v1", 2).await;
    assert!(shown.contains("<memory unit='KiB'>16777216</memory>"), "{shown}");
    let memory = |server: &Server| {
        server.engine.instance(&admin, "default", "v1").unwrap().instance.config["limits.memory"].clone()
    };
    define(&mut client, &shown).await.unwrap();
    assert_eq!(memory(&server), "25%");
    define(&mut client, &shown.replace(">16777216<", ">524288<")).await.unwrap();
    assert_eq!(memory(&server), "524288KiB");
}
