//! What documents of libvirt's own were refused for once: each such part comes to keys, is shown as it was written, and defines the
//! same again; what of it is not done is refused by its name.
#![allow(clippy::disallowed_methods)] // a test tool

use crate::{
    define::{define, dump, ready},
    support::{Client, Server, argument},
};
use karst_engine::Context;
use karst_frontend_libvirt::error::Code;
use karst_model::access::Principal;

const UUID: &str = "0b3c1f9e-7f2c-4d0a-9a53-3a3f6f0f00c1";

/// A machine of nothing but what is asked about.
fn machine(parts: &str, devices: &str) -> String {
    let vcpu = if parts.contains("<vcpu") { "" } else { "<vcpu placement='static'>2</vcpu>" };
    let os = if parts.contains("<os") { "" } else { "<os><type arch='x86_64' machine='pc'>hvm</type></os>" };
    format!(
        "<domain type='kvm'><name>v1</name><uuid>{UUID}</uuid><memory unit='MiB'>128</memory>{vcpu}{parts}{os}<devices>{devices}</devices></domain>"
    )
}

fn key(server: &Server, name: &str) -> Option<String> {
    let view = server.engine.instance(&Context::new(Principal::system()), "default", "v1").unwrap();
    view.expanded_config.get(name).filter(|v| !v.is_empty()).cloned()
}

/// Defines it, and what is shown of it, which stays as it is.
async fn kept(client: &mut Client, text: &str) -> String {
    define(client, text).await.unwrap_or_else(|e| panic!("{e:?}: {text}"));
    let shown = dump(client, "v1", 2).await;
    define(client, &shown).await.unwrap_or_else(|e| panic!("{e:?}: {shown}"));
    assert_eq!(dump(client, "v1", 2).await, shown);
    shown
}

async fn gone(client: &mut Client) {
    let domain = client.domain("v1").await;
    client.call(231, &[&domain[..], &0u32.to_be_bytes()].concat()).await.unwrap();
}

/// Keys and their values.
type Keys = &'static [(&'static str, &'static str)];

/// Whole parts of a domain: the part, the keys that it comes to, and what is shown of it.
const PARTS: &[(&str, Keys, &str)] = &[
    (
        "<idmap><uid start='0' target='1000' count='10'/></idmap>",
        &[],
        "<uid start='0' target='1000' count='10'/>",
    ),
    ("<seclabel type='none'/>", &[], "<seclabel type='none'/>"),
    (
        "<memoryBacking><hugepages><page size='4' unit='KiB'/></hugepages></memoryBacking>",
        &[],
        "<page size='4' unit='KiB'/>",
    ),
    (
        "<memoryBacking><locked/><source type='file'/><access mode='shared'/></memoryBacking>",
        &[("hardware.memory", "disk,locked,shared")],
        "<source type='file'/>",
    ),
    (
        "<sysinfo type='smbios'><system><entry name='serial'>1, 2</entry></system><oemStrings><entry>a</entry><entry>b</entry></oemStrings></sysinfo>\
         <os><type arch='x86_64' machine='pc'>hvm</type><smbios mode='sysinfo'/></os>",
        &[("hardware.smbios.system.serial", "1, 2"), ("hardware.smbios.strings", "a\nb")],
        "<entry name='serial'>1, 2</entry>",
    ),
    (
        "<defaultiothread thread_pool_min='8' thread_pool_max='16'/>",
        &[("hardware.main_thread.pool", "8-16")],
        "<defaultiothread thread_pool_min='8' thread_pool_max='16'/>",
    ),
    (
        "<vcpu placement='auto'>2</vcpu><numatune><memory mode='interleave' placement='auto'/></numatune>",
        &[("hardware.numa.placement", "both"), ("hardware.numa.policy", "interleave")],
        "<memory mode='interleave' placement='auto'/>",
    ),
    (
        "<vcpu placement='auto'>2</vcpu>",
        &[("hardware.numa.placement", "both")],
        "<vcpu placement='auto'>2</vcpu>",
    ),
    (
        "<vcpu placement='auto'>2</vcpu><numatune><memory mode='preferred' nodeset='0'/></numatune>",
        &[
            ("hardware.numa.placement", "cpu"),
            ("hardware.numa.policy", "preferred"),
            ("limits.memory.nodes", "0"),
        ],
        "<memory mode='preferred' nodeset='0'/>",
    ),
    (
        "<vcpu placement='static' cpuset='0'>1</vcpu><numatune><memory mode='strict' placement='auto' nodeset='7'/></numatune>",
        &[("hardware.numa.placement", "memory"), ("limits.cpu", "0-0")],
        "<memory mode='strict' placement='auto' nodeset='7'/>",
    ),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parts_of_a_domain_come_to_keys_and_are_shown() {
    let (server, mut client) = ready().await;
    for (part, keys, line) in PARTS {
        let shown = kept(&mut client, &machine(part, "")).await;
        for (name, value) in *keys {
            assert_eq!(key(&server, name).as_deref(), Some(*value), "{name} of {part}");
        }
        assert!(shown.contains(line), "{line} in {shown}");
        // Without it nothing of it is left.
        define(&mut client, &machine("", "")).await.unwrap();
        for (name, _) in keys.iter().filter(|(name, _)| *name != "limits.cpu") {
            assert_eq!(key(&server, name), None, "{name} after {part}");
        }
        gone(&mut client).await;
    }
}

/// Devices: they, keys of the machine, or of a device (`NAME/KEY`), that they come to, and what is shown.
const DEVICES: &[(&str, Keys, &[&str])] = &[
    (
        "<disk type='block' device='cdrom'><source dev='/dev/vg/a'/><target dev='sda' bus='scsi'/><readonly/>\
         <serial>  WD-WMAP9A966149</serial><wwn>0x5000c50015ea71ac</wwn><vendor>SEA GATE</vendor><product>ST67 807GD</product>\
         <address type='drive' controller='1' bus='0' target='0' unit='0'/></disk>\
         <disk type='block' device='disk'><source dev='/dev/vg/b'/><target dev='vda' bus='virtio'/><serial>abc-_ .+</serial></disk>\
         <controller type='scsi' index='0' model='virtio-scsi'><driver queues='8'/></controller>\
         <controller type='scsi' index='1' model='lsilogic'/>",
        &[
            ("hardware.scsi", "virtio-scsi+queues=8,lsilogic"),
            (
                "sda/io.options",
                "controller=1,serial=  WD-WMAP9A966149,wwn=5000c50015ea71ac,vendor=SEA GATE,product=ST67 807GD",
            ),
            ("vda/io.options", "serial=abc-_ .+"),
        ],
        &[
            "<wwn>0x5000c50015ea71ac</wwn>",
            "<product>ST67 807GD</product>",
            "<address type='drive' controller='1'",
            "<driver queues='8'/>",
            "model='lsilogic'",
        ],
    ),
    (
        "<disk type='block' device='disk'><source dev='/dev/vg/a'/><target dev='sdc' bus='scsi'/>\
         <address type='drive' controller='2' bus='0' target='0' unit='0'/></disk>",
        &[("hardware.scsi", "virtio-scsi,virtio-scsi,virtio-scsi"), ("sdc/io.options", "controller=2")],
        &["<controller type='scsi' index='2' model='virtio-scsi'/>", "<address type='drive' controller='2'"],
    ),
    (
        "<interface type='user'><mac address='00:11:22:33:44:66'/><model type='virtio'/><driver rss='on' rss_hash_report='on'/></interface>\
         <sound model='ac97'/><sound model='ich9'><codec type='micro'/><codec type='output'/></sound>",
        &[
            ("net0/io.options", "rss,hash"),
            ("hardware.sound", "ac97,ich9"),
            ("hardware.sound.codecs", "1=micro+output"),
        ],
        &["<driver rss='on' rss_hash_report='on'/>", "<codec type='output'/>"],
    ),
    (
        "<graphics type='vnc' port='-1' autoport='yes'/><graphics type='egl-headless'/>\
         <video><model type='virtio'><acceleration accel3d='yes'/></model></video>",
        &[("hardware.video", "virtio-gl"), ("hardware.video.render", "auto")],
        &["<graphics type='egl-headless'/>", "<acceleration accel3d='yes'/>"],
    ),
    (
        "<graphics type='egl-headless'><gl rendernode='/dev/dri/renderD128'/></graphics>",
        &[("hardware.video.render", "/dev/dri/renderD128")],
        &["<gl rendernode='/dev/dri/renderD128'/>"],
    ),
    (
        "<serial type='pty'><target type='isa-debug'/><address type='isa' iobase='0x402'/></serial>",
        &[("debug0/port", "debug"), ("debug0/to", "stream")],
        &["<target type='isa-debug'/>"],
    ),
    (
        "<serial type='null'><target type='pci-serial' port='0'/></serial>",
        &[("pci-serial0/port", "pci-serial"), ("pci-serial0/to", "null")],
        &["<target type='pci-serial' port='0'/>"],
    ),
    (
        "<graphics type='vnc' port='-1' autoport='yes'/><channel type='qemu-vdagent'>\
         <target type='virtio' name='com.redhat.spice.0'/><source><clipboard copypaste='yes'/></source></channel>",
        &[("channel0/to", "agent"), ("channel0/clipboard", "true"), ("channel0/name", "com.redhat.spice.0")],
        &["<clipboard copypaste='yes'/>"],
    ),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn devices_of_a_domain_come_to_keys_and_are_shown() {
    let (server, mut client) = ready().await;
    for (devices, keys, lines) in DEVICES {
        let shown = kept(&mut client, &machine("", devices)).await;
        let view = server.engine.instance(&Context::new(Principal::system()), "default", "v1").unwrap();
        for (name, value) in *keys {
            let found = match name.split_once('/') {
                Some((device, key)) => view.expanded_devices[device].get(key),
                None => view.expanded_config.get(*name),
            };
            assert_eq!(found.map(String::as_str), Some(*value), "{name} of {devices}");
        }
        for line in *lines {
            assert!(shown.contains(line), "{line} in {shown}");
        }
        gone(&mut client).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_brings_the_controller_that_it_is_at() {
    let (server, mut client) = ready().await;
    define(&mut client, &machine("", "")).await.unwrap();
    let disk = "<disk type='block' device='disk'><source dev='/dev/vg/b'/><target dev='sdb' bus='scsi'/><serial>S 1</serial>\
        <address type='drive' controller='1' bus='0' target='0' unit='0'/></disk>";
    let domain = client.domain("v1").await;
    let said = argument(|w| {
        w.string(disk).u32(2);
    });
    client.call(160, &[domain, said].concat()).await.unwrap();
    assert_eq!(key(&server, "hardware.scsi").as_deref(), Some("virtio-scsi,virtio-scsi"));
    let shown = dump(&mut client, "v1", 2).await;
    let lines = ["<serial>S 1</serial>", "<address type='drive' controller='1'", "type='scsi' index='1'"];
    assert!(lines.iter().all(|line| shown.contains(line)), "{shown}");
    define(&mut client, &shown).await.unwrap();
    assert_eq!(dump(&mut client, "v1", 2).await, shown);
}

/// What is still not done, by the word that names it.
const REFUSED: &[(&str, &str, &str)] = &[
    ("<seclabel type='none' model='dac'/>", "", "seclabel"),
    ("<numatune><memory mode='near' nodeset='0'/></numatune>", "", "numatune mode"),
    ("<numatune><memory placement='near'/></numatune>", "", "numatune placement"),
    ("<sysinfo type='fwcfg'><entry name='opt/x'>y</entry></sysinfo>", "", "sysinfo"),
    (
        "<sysinfo type='smbios'><system><entry name='owner'>me</entry></system></sysinfo>\
         <os><type arch='x86_64' machine='pc'>hvm</type><smbios mode='sysinfo'/></os>",
        "",
        "sysinfo system",
    ),
    ("<vcpu placement='near'>1</vcpu>", "", "vcpu"),
    (
        "<memoryBacking><hugepages><page size='4' unit='KiB' nodeset='0'/></hugepages></memoryBacking>",
        "",
        "memoryBacking",
    ),
    ("", "<controller type='scsi' index='0' model='lsilogic'/>", "controller model"),
    ("", "<sound model='ac97'><codec type='micro'/></sound>", "sound codec"),
    ("", "<video><model type='virtio'><acceleration accel3d='yes'/></model></video>", "video"),
    ("", "<graphics type='egl-headless'><gl rendernode='/dev/sda'/></graphics>", "graphics gl"),
    ("", "<sound model='ich6'><codec type='loud'/></sound>", "sound codec"),
    (
        "",
        "<graphics type='spice' autoport='yes'/><channel type='qemu-vdagent'><target type='virtio' name='com.redhat.spice.0'/></channel>",
        "channel",
    ),
    (
        "",
        "<disk type='block' device='disk'><source dev='/dev/vg/a'/><target dev='vda' bus='virtio'/>\
         <serial>123456789012345678901</serial></disk>",
        "disk serial",
    ),
    (
        "",
        "<disk type='block' device='disk'><source dev='/dev/vg/a'/><target dev='vda' bus='virtio'/><vendor>SEA</vendor></disk>",
        "disk vendor",
    ),
    (
        "",
        "<disk type='block' device='disk'><source dev='/dev/vg/a'/><target dev='sdh' bus='scsi'/>\
         <address type='drive' controller='1' bus='0' target='0' unit='0'/></disk>\
         <controller type='scsi' index='1' model='lsilogic'/>",
        "disk target",
    ),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_rest_is_refused_by_its_name() {
    let (_server, mut client) = ready().await;
    for (part, devices, word) in REFUSED {
        let refused = define(&mut client, &machine(part, devices)).await.unwrap_err();
        assert_eq!(refused.0, Code::ConfigUnsupported as i32, "{part}{devices}: {refused:?}");
        assert!(refused.1.contains(word), "{part}{devices}: {refused:?}");
    }
}
