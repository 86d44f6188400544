//! What single elements of a domain's document come to: disks in snapshots, clocks, pins, filters, and what machines that were
//! made elsewhere have.
#![allow(clippy::disallowed_methods)] // a test tool

use crate::{
    define::{define, domain, dump, ready, volume},
    support::{Client, argument},
};
use karst_engine::{Context, compute::update::UpdateInstance};
use karst_frontend_libvirt::{error::Code, xdr::Reader};
use karst_model::{
    ErrorKind,
    access::{Grant, Principal, Role},
    device::{DISK_BUSES, DISK_CACHES, DiskBus},
    instance::InstanceKind,
    storage::VolumeContent,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_says_which_disks_it_does_not_hold() {
    let (_server, mut client) = ready().await;
    let written = ("<target dev='sdc' bus='scsi'/><readonly/>", "<target dev='sdc' bus='scsi'/>");
    define(&mut client, &domain("v1", &[written])).await.unwrap();
    let v1 = client.domain("v1").await;
    client.call(9, &v1).await.unwrap();
    let create = async |client: &mut Client, inner: &str| {
        let xml = format!("<domainsnapshot>{inner}</domainsnapshot>");
        let said = argument(|w| {
            w.string(&xml).u32(0);
        });
        client.call(185, &[v1.clone(), said].concat()).await
    };
    // All that the guest writes to is asked for, by a document that says nothing too.
    for inner in [
        "",
        "<memory snapshot='no'/>",
        "<disks><disk name='vda' snapshot='internal'/></disks>",
        "<disks><disk name='sdc' snapshot='internal'/></disks>",
        "<disks><disk name='/karst/default/d2'/></disks>",
    ] {
        let refused = create(&mut client, inner).await.unwrap_err();
        assert!(
            refused.0 == Code::ConfigUnsupported as i32 && refused.1.contains("sdc"),
            "{inner}: {refused:?}"
        );
    }
    // Its memory would not fit what is on the disk later.
    let without = "<disks><disk name='sdc' snapshot='no'/></disks>";
    let refused = create(&mut client, without).await.unwrap_err();
    assert!(refused.0 == Code::OperationInvalid as i32 && refused.1.contains("memory"), "{refused:?}");
    let none = argument(|w| {
        w.u32(0);
    });
    let count = client.call(187, &[v1.clone(), none.clone()].concat()).await.unwrap();
    assert_eq!(Reader::new(&count).i32().unwrap(), 0);
    let taken = create(&mut client, &format!("<memory snapshot='no'/>{without}")).await.unwrap();
    let shown = client.call(186, &[taken, none].concat()).await.unwrap();
    let shown = Reader::new(&shown).string().unwrap();
    for line in ["<disk name='vda' snapshot='internal'/>", "<disk name='sdc' snapshot='no'/>"] {
        assert!(shown.contains(line), "{shown}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_clock_and_pins_of_a_document_are_the_machines() {
    let (server, mut client) = ready().await;
    let admin = Context::new(Principal::system());
    let config = |key: &str| {
        let view = server.engine.instance(&admin, "default", "v1").unwrap();
        view.expanded_config.get(key).cloned()
    };
    let local = [
        ("offset='utc'", "offset='localtime'"),
        ("placement='static' current='1'>2<", "cpuset='1'>1<"),
        ("cores='2'", "cores='1'"),
    ];
    define(&mut client, &domain("v1", &local)).await.unwrap();
    assert_eq!(config("hardware.clock").as_deref(), Some("localtime"));
    assert_eq!(config("limits.cpu").as_deref(), Some("1-1"), "the second one of the host, not one");
    let shown = dump(&mut client, "v1", 2).await;
    assert!(shown.contains("<clock offset='localtime'>") && shown.contains("cpuset='1'>1<"), "{shown}");
    define(&mut client, &shown).await.unwrap();
    assert_eq!(dump(&mut client, "v1", 2).await, shown);
    // As it is set elsewhere it is shown, whatever was kept of the document.
    let utc = shown.replace("offset='localtime'", "offset='utc'").replace("state='on'", "state='off'");
    define(&mut client, &utc).await.unwrap();
    assert_eq!(config("hardware.clock").as_deref(), Some("utc"));
    assert_eq!(config("hardware.hyperv").as_deref(), Some("false"));
    let shown = dump(&mut client, "v1", 2).await;
    assert!(shown.contains("<clock offset='utc'>") && shown.contains("<relaxed state='off'/>"), "{shown}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_that_crashed_may_be_preserved() {
    let (server, mut client) = ready().await;
    let admin = Context::new(Principal::system());
    let ends = |on_crash: &str| format!("<on_crash>{on_crash}</on_crash><devices>");
    define(&mut client, &domain("v1", &[("<devices>", &ends("preserve"))])).await.unwrap();
    let config = |key: &str| {
        server.engine.instance(&admin, "default", "v1").unwrap().instance.config.get(key).cloned()
    };
    assert_eq!(config("boot.crash_action").as_deref(), Some("halt"));
    let shown = dump(&mut client, "v1", 2).await;
    assert!(shown.contains("<on_crash>preserve</on_crash>"), "{shown}");
    define(&mut client, &shown).await.unwrap();
    assert_eq!(dump(&mut client, "v1", 2).await, shown);
    define(&mut client, &domain("v1", &[("<devices>", &ends("restart"))])).await.unwrap();
    assert_eq!(config("boot.crash_action").as_deref(), Some("stop"));
    assert_eq!(config("boot.autorestart").as_deref(), Some("true"));
    assert!(dump(&mut client, "v1", 2).await.contains("<on_crash>restart</on_crash>"));
    let dumped = define(&mut client, &domain("v1", &[("<devices>", &ends("coredump-destroy"))])).await;
    assert_eq!(dumped.unwrap_err().0, Code::ConfigUnsupported as i32);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_filter_is_bound_by_its_name_with_the_addresses_it_gives() {
    let (server, mut client) = ready().await;
    let admin = Context::new(Principal::system());
    let network = server.engine.network(&admin, "default", "karstbr0").unwrap();
    // The ninth of its addresses.
    let subnet = network.config["ipv4.address"].split('/').next().unwrap().to_owned();
    let address = format!("{}.9", subnet.rsplit_once('.').unwrap().0);
    let filter = |inner: &str| domain("v1", &[("<filterref filter='clean-traffic'/>", inner)]);
    let given =
        format!("<filterref filter='no-arp-spoofing'><parameter name='IP' value='{address}'/></filterref>");
    define(&mut client, &filter(&given)).await.unwrap();
    let nic = || server.engine.instance(&admin, "default", "v1").unwrap().expanded_devices["net0"].clone();
    assert_eq!(nic()["ipv4.address"], address);
    assert_eq!(
        (nic()["security.mac_filtering"].as_str(), nic()["security.ipv4_filtering"].as_str()),
        ("true", "true")
    );
    let shown = dump(&mut client, "v1", 2).await;
    assert!(
        shown.contains("filter='no-arp-spoofing'") && shown.contains(&format!("value='{address}'")),
        "{shown}"
    );
    define(&mut client, &shown).await.unwrap();
    assert_eq!(dump(&mut client, "v1", 2).await, shown);
    // One that only lets pass keeps nothing away, and what is reserved stays so.
    define(&mut client, &filter("<filterref filter='allow-dhcp'/>")).await.unwrap();
    assert!(!nic().contains_key("security.mac_filtering") && nic()["ipv4.address"] == address, "{:?}", nic());
    assert!(dump(&mut client, "v1", 2).await.contains("<filterref filter='allow-dhcp'/>"));
}

/// What is made elsewhere is shown so that it can be read, whatever its disks and interfaces are: else no change of it would
/// be possible here.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_shown_of_any_machine_can_be_defined() {
    let (server, mut client) = ready().await;
    server.guest("v1", InstanceKind::VirtualMachine, false).await;
    let admin = Context::new(Principal::system());
    // This machine has no controllers of IDE and of USB.
    let other = [DiskBus::Virtiofs, DiskBus::Plan9, DiskBus::Ide, DiskBus::Floppy, DiskBus::Usb];
    let drives = DISK_BUSES.iter().filter(|(_, bus)| !other.contains(bus));
    let caches = [None].into_iter().chain(DISK_CACHES.iter().map(|(name, _)| Some(*name)));
    let all = drives.flat_map(|bus| caches.clone().map(move |cache| (bus, cache)));
    // NVMe has a cache of its own.
    let through = |cache: &Option<&str>| matches!(cache, Some("writethrough" | "directsync"));
    for ((bus, _), cache) in all.filter(|((bus, _), cache)| *bus != "nvme" || !through(cache)) {
        let view = server.engine.instance(&admin, "default", "v1").unwrap();
        let mut devices = view.instance.devices.clone();
        let keys = [
            ("type", "disk"),
            ("pool", "default"),
            ("source", "d1"),
            ("io.bus", *bus),
            ("boot.priority", "7"),
        ];
        let keys = keys.into_iter().chain(cache.map(|cache| ("io.cache", cache)));
        devices.insert("more".into(), keys.map(|(k, v)| (k.to_owned(), v.to_owned())).collect());
        let request = UpdateInstance {
            description: String::new(),
            ephemeral: false,
            config: view.instance.config.clone(),
            devices: devices.clone(),
            profiles: view.profiles.iter().map(|p| p.name.to_string()).collect(),
            if_version: None,
        };
        let operation =
            server.engine.instance_update(&admin, "default", "v1", request.clone()).await.unwrap();
        assert_eq!(operation.ended().await.error, None);
        let shown = dump(&mut client, "v1", 2).await;
        define(&mut client, &shown).await.unwrap_or_else(|e| panic!("{bus} {cache:?}: {e:?} of {shown}"));
        assert_eq!(dump(&mut client, "v1", 2).await, shown, "{bus} {cache:?}");
        let after = server.engine.instance(&admin, "default", "v1").unwrap();
        assert_eq!(after.instance.devices, devices, "{bus} {cache:?}: nothing of it is changed");
        devices.remove("more");
        let without = UpdateInstance { devices, config: after.instance.config.clone(), ..request };
        let operation = server.engine.instance_update(&admin, "default", "v1", without).await.unwrap();
        assert_eq!(operation.ended().await.error, None);
    }
    // One that is attached here.
    let nvme = "<disk type='file' device='disk'><source file='/karst/default/d2'/><target dev='nvme3n1' bus='nvme'/></disk>";
    let v1 = client.domain("v1").await;
    let said = argument(|w| {
        w.string(nvme).u32(2);
    });
    client.call(160, &[v1, said].concat()).await.unwrap();
    let view = server.engine.instance(&admin, "default", "v1").unwrap();
    assert_eq!(view.expanded_devices["nvme3n1"]["io.bus"], "nvme");
    assert_eq!(view.instance.identities["nvme3n1"].slot, "nvme3");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_of_an_instance_is_not_taken_for_a_users_of_the_same_name() {
    let (server, mut client) = ready().await;
    volume(&server, "v1", VolumeContent::Block).await;
    server.guest("v1", InstanceKind::VirtualMachine, false).await;
    let by_path = async |client: &mut Client, path: &str| {
        let said = argument(|w| {
            w.string(path);
        });
        client.call(97, &said).await.unwrap()
    };
    let users = by_path(&mut client, "/karst/default/v1").await;
    let instances = by_path(&mut client, "/karst/default/instances/v1").await;
    assert_ne!(users, instances);
    let shown = dump(&mut client, "v1", 2).await;
    assert!(shown.contains("<source pool='default' volume='instances/v1'/>"), "{shown}");
    // What a domain that is defined refers to by that path is the user's; the other is in use by its instance alone.
    let disk = "<source file='/karst/default/d1'/>";
    let of = |path: &str| {
        let source = format!("<source file='{path}'/>");
        domain("v2", &[(disk, source.as_str())])
    };
    let refused = define(&mut client, &of("/karst/default/instances/v1")).await.unwrap_err();
    assert!(refused.1.contains("instances/v1"), "{refused:?}");
    define(&mut client, &of("/karst/default/v1")).await.unwrap();
    let deleted = client.call(94, &[instances, vec![0; 4]].concat()).await.unwrap_err();
    assert!(deleted.1.contains("part of the domain"), "{deleted:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_path_of_the_host_is_a_drive_by_its_administrators_word() {
    let (server, mut client) = ready().await;
    volume(&server, "d3", VolumeContent::Block).await;
    let second = "<disk type='volume' device='disk'><source pool='default' volume='d2'/><target dev='sdc' bus='scsi'/><readonly/></disk>";
    let path = |device: &str, file: &str, dev: &str| {
        format!(
            "<disk type='file' device='{device}'><driver name='qemu' type='raw'/><source file='{file}'/><target dev='{dev}' bus='scsi'/></disk>"
        )
    };
    let both = path("disk", "/srv/data.img", "sdc") + &path("cdrom", "/srv/Debian.ISO", "sdd");
    define(&mut client, &domain("v1", &[(second, both.as_str())])).await.unwrap();
    let admin = Context::new(Principal::system());
    let view = server.engine.instance(&admin, "default", "v1").unwrap();
    assert_eq!(view.expanded_devices["sdc"]["source"], "/srv/data.img");
    assert!(!view.expanded_devices["sdc"].contains_key("pool"));
    let shown = dump(&mut client, "v1", 2).await;
    for line in ["<source file='/srv/data.img'/>", "<source file='/srv/Debian.ISO'/>", "device='cdrom'"] {
        assert!(shown.contains(line), "{line} in {shown}");
    }
    define(&mut client, &shown).await.unwrap();
    assert_eq!(dump(&mut client, "v1", 2).await, shown);
    // It is in one machine; a disc is in as many as like.
    let other = |disks: &str| {
        let changes = [
            ("c7a5fdbd-edaf-9455-926a-d65c16db1809", "c7a5fdbd-edaf-9455-926a-d65c16db1810"),
            ("52:54:00:11:22:33", "52:54:00:11:22:34"),
            ("/karst/default/d1", "/karst/default/d3"),
            (second, disks),
        ];
        domain("v2", &changes)
    };
    for (disk, word) in [
        (path("disk", "/srv/data.img", "sdc"), "is a drive of"),
        (path("disk", "/srv/other.img", "sdc").replace("type='raw'", "type='vmdk'"), "driver type"),
        (path("disk", "/srv/other.img", "hda").replace("scsi", "ide"), "disk bus"),
    ] {
        let refused = define(&mut client, &other(&disk)).await.unwrap_err();
        assert!(refused.1.contains(word), "{disk}: {refused:?}");
    }
    // Its format is stated, and what it is where its name does not say it.
    let stated = path("disk", "/srv/other.img", "sdc").replace("type='raw'", "type='qcow2'")
        + &path("cdrom", "/srv/other.disc", "sde").replace(" type='raw'", "")
        + &path("cdrom", "/srv/Debian.ISO", "sdd");
    define(&mut client, &other(&stated)).await.unwrap();
    let view = server.engine.instance(&admin, "default", "v2").unwrap();
    let keys = |device: &str, key: &str| view.expanded_devices[device].get(key).cloned().unwrap_or_default();
    assert_eq!((keys("sdc", "format").as_str(), keys("sdc", "media").as_str()), ("qcow2", ""));
    assert_eq!((keys("sde", "format").as_str(), keys("sde", "media").as_str()), ("", "cdrom"));
    assert_eq!(keys("sdd", "media"), "");
    let shown = dump(&mut client, "v2", 2).await;
    for line in ["<driver name='qemu' type='qcow2'/>", "<source file='/srv/other.disc'/>"] {
        assert!(shown.contains(line), "{line} in {shown}");
    }
    define(&mut client, &shown).await.unwrap();
    assert_eq!(dump(&mut client, "v2", 2).await, shown);
    // Who runs the instances of all projects is no administrator of the server; what is there stays.
    let mut principal = Principal::unix_admin(1000, 1000, 1);
    principal.grants = vec![Grant { role: Role::Operator, project: None }];
    let operator = Context::new(principal);
    let view = server.engine.instance(&operator, "default", "v1").unwrap();
    let request = |devices| UpdateInstance {
        description: "by an operator".into(),
        ephemeral: false,
        config: view.instance.config.clone(),
        devices,
        profiles: vec![],
        if_version: None,
    };
    let mut more = view.instance.devices.clone();
    let keys = [("type", "disk"), ("source", "/srv/more.img")];
    more.insert("more".into(), keys.map(|(k, v)| (k.to_owned(), v.to_owned())).into());
    let refused =
        server.engine.instance_update(&operator, "default", "v1", request(more)).await.err().unwrap();
    assert_eq!((refused.kind, refused.field.as_deref()), (ErrorKind::Forbidden, Some("devices.more.source")));
    let same = request(view.instance.devices.clone());
    let operation = server.engine.instance_update(&operator, "default", "v1", same).await.unwrap();
    assert_eq!(operation.ended().await.error, None);
    // Nor does he let a machine out as the host itself.
    let view = server.engine.instance(&operator, "default", "v1").unwrap();
    let mut out = view.instance.devices.clone();
    let keys = [("type", "nic"), ("nictype", "user")];
    out.insert("out".into(), keys.map(|(k, v)| (k.to_owned(), v.to_owned())).into());
    let request = |devices| UpdateInstance {
        description: String::new(),
        ephemeral: false,
        config: view.instance.config.clone(),
        devices,
        profiles: vec![],
        if_version: None,
    };
    let refused =
        server.engine.instance_update(&operator, "default", "v1", request(out.clone())).await.err().unwrap();
    assert_eq!((refused.kind, refused.field.as_deref()), (ErrorKind::Forbidden, Some("devices.out.nictype")));
    let operation = server.engine.instance_update(&admin, "default", "v1", request(out)).await.unwrap();
    assert_eq!(operation.ended().await.error, None);
}

/// A machine is kept by a root that its guest does not see where its document has no disk of a pool.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_needs_no_disk_and_has_what_its_document_says() {
    let (server, mut client) = ready().await;
    let text = "<domain type='kvm'><name>bare</name><memory unit='MiB'>128</memory><vcpu>4</vcpu>
        <genid>0b3c1f9e-7f2c-4d0a-9a53-3a3f6f0f0001</genid>
        <os><type arch='i686' machine='pc'>hvm</type><boot dev='hd'/><bootmenu enable='yes' timeout='3000'/></os>
        <features><pmu state='off'/></features>
        <cpu><topology sockets='2' dies='1' cores='2' threads='1'/></cpu>
        <clock offset='utc'><timer name='kvmclock' present='no'/></clock>
        <devices><disk type='block' device='disk'><source dev='/dev/vg/a'/><target dev='hda' bus='ide'/></disk>
        <disk type='file' device='cdrom'><target dev='hdc' bus='ide'/><readonly/></disk>
        <controller type='usb' index='0' model='qemu-xhci' ports='8'/><hub type='usb'/>
        <input type='tablet' bus='usb'/><sound model='ich6'/><watchdog model='i6300esb' action='poweroff'/>
        <interface type='user'><mac address='52:54:00:11:22:33'/><model type='rtl8139'/></interface>
        <video><model type='cirrus'/></video><panic/><memballoon model='none'/></devices></domain>";
    define(&mut client, text).await.unwrap();
    let admin = Context::new(Principal::system());
    let view = server.engine.instance(&admin, "default", "bare").unwrap();
    for (key, value) in [
        ("hardware.cpu.model", "qemu32,pmu=off,kvmclock=off"),
        ("hardware.cpu.topology", "sockets=2,dies=1,cores=2,threads=1"),
        ("hardware.usb", "qemu-xhci:8"),
        ("hardware.usb.devices", "hub,tablet"),
        ("hardware.sound", "ich6"),
        ("hardware.video", "cirrus"),
        ("hardware.watchdog", "i6300esb:poweroff"),
        ("hardware.panic", "true"),
        ("hardware.balloon", "false"),
        ("hardware.boot_menu.timeout", "3000"),
        ("hardware.generation", "0b3c1f9e-7f2c-4d0a-9a53-3a3f6f0f0001"),
    ] {
        assert_eq!(view.expanded_config.get(key).map(String::as_str), Some(value), "{key}");
    }
    assert_eq!(view.instance.identities["hda"].slot, "ide0");
    assert_eq!(view.instance.identities["root"].slot, "hidden0");
    let shown = dump(&mut client, "bare", 2).await;
    for line in [
        "arch='i686'",
        "<target dev='hda' bus='ide'/>",
        "<topology sockets='2' dies='1' cores='2' threads='1'/>",
        "<timer name='kvmclock' present='no'/>",
        "<memballoon model='none'/>",
        "<hub type='usb'/>",
        "<interface type='user'>",
        "<model type='rtl8139'/>",
    ] {
        assert!(shown.contains(line), "{line} in {shown}");
    }
    assert!(!shown.contains("instances/bare"), "{shown}");
    define(&mut client, &shown).await.unwrap();
    assert_eq!(dump(&mut client, "bare", 2).await, shown);
    // What is taken away is there no more, and what is changed elsewhere is shown.
    let less = shown.replace("<sound model='ich6'/>", "").replace("<panic/>", "");
    define(&mut client, &less).await.unwrap();
    let mut view = server.engine.instance(&admin, "default", "bare").unwrap();
    assert!(!view.expanded_config.contains_key("hardware.sound"));
    let mut config = view.instance.config.clone();
    config.insert("hardware.watchdog".into(), "ib700:none".into());
    config.insert("hardware.cpu.model".into(), "n270".into());
    let request = UpdateInstance {
        description: String::new(),
        ephemeral: false,
        config,
        devices: view.instance.devices.clone(),
        profiles: vec![],
        if_version: None,
    };
    let operation = server.engine.instance_update(&admin, "default", "bare", request).await.unwrap();
    assert_eq!(operation.ended().await.error, None);
    let shown = dump(&mut client, "bare", 2).await;
    for line in ["<watchdog model='ib700' action='none'/>", ">n270<", "arch='i686'"] {
        assert!(shown.contains(line), "{line} in {shown}");
    }
    assert!(!shown.contains("kvmclock") && !shown.contains("<pmu"), "{shown}");
    // It is started and undefined like any other.
    let domain = client.domain("bare").await;
    client.call(9, &domain).await.unwrap();
    view = server.engine.instance(&admin, "default", "bare").unwrap();
    assert!(view.runtime.is_some());
    client.call(12, &domain).await.unwrap();
    client.call(231, &[&domain[..], &0u32.to_be_bytes()].concat()).await.unwrap();
    // Nothing of it is left: no volume of its name either.
    let left = server.engine.custom_volume(&admin, "default", "default", "bare");
    assert!(left.is_err() && server.engine.instance(&admin, "default", "bare").is_err());
}

/// What QEMU has beside what is usual is said by keys, shown as it was written, and corrected when the keys say otherwise.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn options_of_a_machine_are_keys_and_are_shown() {
    let (server, mut client) = ready().await;
    let text = "<domain type='kvm'><name>rich</name><memory unit='MiB'>128</memory><vcpu>2</vcpu>
        <memoryBacking><hugepages><page size='2' unit='MiB' nodeset='1'/></hugepages><discard/></memoryBacking>
        <numatune><memory mode='strict' nodeset='0-1'/><memnode cellid='0' mode='preferred' nodeset='0'/></numatune>
        <os><type arch='x86_64' machine='q35'>hvm</type></os>
        <features><acpi/><kvm><dirty-ring state='on' size='4096'/></kvm><ioapic driver='qemu'/><vmcoreinfo/></features>
        <cpu><numa><cell id='0' cpus='0' memory='64' unit='MiB' memAccess='shared'>
        <distances><sibling id='1' value='21'/></distances></cell><cell id='1' cpus='1' memory='64' unit='MiB'/></numa></cpu>
        <clock offset='absolute' start='60'><timer name='rtc' track='realtime'/></clock>
        <devices><disk type='file' device='disk'><driver name='qemu' type='raw' queues='4' error_policy='stop' iommu='on'/>
        <source file='/var/a'/><target dev='vda' bus='virtio'/><iotune><total_bytes_sec>5000</total_bytes_sec>
        <total_bytes_sec_max>9000</total_bytes_sec_max></iotune></disk>
        <disk type='file' device='disk'><source file='/var/b'/><target dev='sda' bus='usb' removable='on'/></disk>
        <disk type='file' device='floppy'><source file='/var/c'/><target dev='fda' bus='fdc'/></disk>
        <controller type='scsi' index='0' model='virtio-scsi'><driver packed='on'/></controller>
        <interface type='user'><mac address='52:54:00:11:22:33'/><model type='virtio'/>
        <driver txmode='timer' event_idx='off'><host csum='off'/></driver><rom enabled='no'/></interface>
        <rng model='virtio'><rate bytes='5' period='1000'/><backend model='random'>/dev/urandom</backend></rng>
        <rng model='virtio'><backend model='random'>/dev/urandom</backend><driver ats='on'/></rng>
        <tpm model='tpm-tis'><backend type='emulator' version='2.0'/></tpm><panic model='hyperv'/>
        <iommu model='intel'><driver intremap='on' iotlb='on'/></iommu>
        <memballoon model='virtio'><driver iommu='on'/></memballoon></devices></domain>";
    define(&mut client, text).await.unwrap();
    let admin = Context::new(Principal::system());
    let view = server.engine.instance(&admin, "default", "rich").unwrap();
    for (key, value) in [
        ("hardware.features", "vmcoreinfo,hyperv-panic,split-irqchip,tpm-tis,rtc-realtime,dirty-ring=4096"),
        ("hardware.clock.start", "60"),
        ("hardware.iommu", "intel,intremap=on,iotlb"),
        ("hardware.numa.memory", "0=shared;1=hugepages=2MiB"),
        ("hardware.numa.host", "0=preferred:0"),
        ("hardware.numa.distances", "0-1=21"),
        ("hardware.rng", "rate=5/1000,ats"),
        ("hardware.virtio", "balloon=iommu,scsi=packed"),
        ("hardware.usb", "piix3-uhci"),
        ("limits.memory.nodes", "0-1"),
    ] {
        assert_eq!(view.expanded_config.get(key).map(String::as_str), Some(value), "{key}");
    }
    for (device, key, value) in [
        ("vda", "io.options", "iommu,queues=4,write-errors=stop,read-errors=stop"),
        ("vda", "limits.rates", "total-bytes=5000/9000"),
        ("sda", "io.options", "removable"),
        ("net0", "io.options", "event-index=off,rom=off,tx=timer,csum=off"),
    ] {
        assert_eq!(view.expanded_devices[device].get(key).map(String::as_str), Some(value), "{device} {key}");
    }
    let shown = dump(&mut client, "rich", 2).await;
    for line in [
        "nodeset='1'",
        "<memnode cellid='0' mode='preferred' nodeset='0'/>",
        "<sibling id='1' value='21'/>",
        "<clock offset='absolute' start='60'>",
        "queues='4' error_policy='stop' iommu='on'",
        "<total_bytes_sec_max>9000</total_bytes_sec_max>",
        "<target dev='sda' bus='usb' removable='on'/>",
        "<driver packed='on'/>",
        "<driver txmode='timer' event_idx='off'>",
        "<rate bytes='5' period='1000'/>",
        "<tpm model='tpm-tis'>",
        "<panic model='hyperv'/>",
        "<driver intremap='on' iotlb='on'/>",
    ] {
        assert!(shown.contains(line), "{line} in {shown}");
    }
    define(&mut client, &shown).await.unwrap();
    assert_eq!(dump(&mut client, "rich", 2).await, shown);
    // What is changed elsewhere is shown, and nothing of before.
    let (mut config, mut devices) = (view.instance.config.clone(), view.instance.devices.clone());
    for (key, value) in [
        ("hardware.features", ""),
        ("hardware.clock.start", ""),
        ("hardware.iommu", "virtio"),
        ("hardware.numa.memory", "1=private"),
        ("hardware.numa.host", "1=bind:1"),
        ("hardware.numa.distances", ""),
        ("hardware.rng", ""),
        ("hardware.virtio", "serial=ats"),
    ] {
        config.insert(key.into(), value.into());
    }
    let disk = devices.get_mut("vda").unwrap();
    disk.insert("io.options".into(), "blocks=512/4096".into());
    disk.remove("limits.rates");
    disk.insert("limits.read".into(), "7iops".into());
    devices.get_mut("net0").unwrap().remove("io.options");
    let request = UpdateInstance {
        description: String::new(),
        ephemeral: false,
        config,
        devices,
        profiles: vec![],
        if_version: None,
    };
    let operation = server.engine.instance_update(&admin, "default", "rich", request).await.unwrap();
    assert_eq!(operation.ended().await.error, None);
    let shown = dump(&mut client, "rich", 2).await;
    for line in [
        "<iommu model='virtio'/>",
        "memAccess='private'",
        "<memnode cellid='1' mode='strict' nodeset='1'/>",
        "<blockio logical_block_size='512' physical_block_size='4096'/>",
        "<read_iops_sec>7</read_iops_sec>",
        "<driver ats='on'/>",
        "<tpm model='tpm-crb'>",
        "<clock offset='utc'",
    ] {
        assert!(shown.contains(line), "{line} in {shown}");
    }
    for gone in [
        "dirty-ring",
        "nodeset='1'/></hugepages>",
        "queues=",
        "total_bytes_sec",
        "txmode",
        "<rate ",
        "hyperv",
        "packed",
        "sibling",
    ] {
        assert!(!shown.contains(gone), "{gone} in {shown}");
    }
    define(&mut client, &shown).await.unwrap();
    assert_eq!(dump(&mut client, "rich", 2).await, shown);
}
