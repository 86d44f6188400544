//! What each row keeps and refuses.

use super::*;
use crate::{error::Code, xml::read::document};

const TABLES: &[(&str, &[Row])] = &[
    ("domain", DOMAIN),
    ("os", OS),
    ("features", FEATURES),
    ("cpu", CPU),
    ("clock", CLOCK),
    ("devices", DEVICES),
    ("disk", DISK),
    ("interface", INTERFACE),
];

/// Of each row with a condition: its element, what is kept of it, and what is refused. Of a row for an attribute the element
/// that has it.
const SAMPLES: &[(&str, &str, &str, &str)] = &[
    ("domain", "memory", "<memory unit='MiB' dumpCore='off'>1</memory>", "<memory dumpCore='on'>1</memory>"),
    ("domain", "vcpu", "<vcpu placement='auto'>1</vcpu>", "<vcpu placement='near'>1</vcpu>"),
    (
        "domain",
        "memoryBacking",
        "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>",
        "<memoryBacking><source type='tape'/></memoryBacking>",
    ),
    (
        "domain",
        "resource",
        "<resource><partition>/machine</partition></resource>",
        "<resource><partition>/gold</partition></resource>",
    ),
    ("domain", "on_poweroff", "<on_poweroff>destroy</on_poweroff>", "<on_poweroff>restart</on_poweroff>"),
    ("domain", "on_reboot", "<on_reboot>restart</on_reboot>", "<on_reboot>preserve</on_reboot>"),
    ("domain", "on_crash", "<on_crash>destroy</on_crash>", "<on_crash>coredump-destroy</on_crash>"),
    (
        "domain",
        "pm",
        "<pm><suspend-to-mem enabled='no'/></pm>",
        "<pm><suspend-to-disk enabled='no'/><suspend-to-mem enabled='maybe'/></pm>",
    ),
    (
        "domain",
        "perf",
        "<perf><event name='cmt' enabled='no'/></perf>",
        "<perf><event name='cmt' enabled='yes'/></perf>",
    ),
    (
        "domain",
        "seclabel",
        "<seclabel type='dynamic' model='dac' relabel='yes'/>",
        "<seclabel type='none' model='apparmor'/>",
    ),
    ("domain", "seclabel", "<seclabel type='none'/>", "<seclabel type='static' relabel='no'/>"),
    ("os", "nvram", "<nvram template='/x'>/y</nvram>", "<nvram type='network'/>"),
    (
        "os",
        "nvram",
        "<nvram type='file'><source file='/y'/></nvram>",
        "<nvram type='file'><source file='/y'><seclabel model='dac'/></source></nvram>",
    ),
    (
        "os",
        "firmware",
        "<firmware><feature enabled='no' name='enrolled-keys'/><feature enabled='no' name='secure-boot'/></firmware>",
        "<firmware><feature enabled='no' name='enrolled-keys'/><feature enabled='yes' name='secure-boot'/></firmware>",
    ),
    ("os", "boot", "<boot dev='hd'/>", "<boot dev='tape'/>"),
    ("os", "smbios", "<smbios mode='sysinfo'/>", "<smbios mode='host'/>"),
    ("domain", "sysinfo", "<sysinfo type='smbios'/>", "<sysinfo type='fwcfg'/>"),
    ("os", "bios", "<bios useserial='no' rebootTimeout='5000'/>", "<bios useserial='yes'/>"),
    ("os", "dtb", "<dtb/>", "<dtb>/boot/dtb</dtb>"),
    (
        "features",
        "hyperv",
        "<hyperv><relaxed state='on'/><spinlocks state='on' retries='8191'/><evmcs state='off'/></hyperv>",
        "<hyperv mode='host-model'/>",
    ),
    ("features", "kvm", "<kvm><hidden state='on'/></kvm>", "<kvm><teleport state='on'/></kvm>"),
    ("features", "vmport", "<vmport state='off'/>", "<vmport state='on'/>"),
    ("features", "smm", "<smm state='on'><tseg unit='MiB'>48</tseg></smm>", "<smm state='maybe'/>"),
    ("features", "vmcoreinfo", "<vmcoreinfo/>", "<vmcoreinfo state='maybe'/>"),
    ("features", "ioapic", "<ioapic driver='qemu'/>", "<ioapic driver='other'/>"),
    ("features", "tcg", "<tcg><tb-cache unit='MiB'>100</tb-cache></tcg>", "<tcg><other/></tcg>"),
    ("features", "ps2", "<ps2 state='on'/>", "<ps2 state='off'/>"),
    ("cpu", "@match", "<cpu match='exact'/>", "<cpu match='any'/>"),
    ("cpu", "@migratable", "<cpu migratable='off'/>", "<cpu migratable='perhaps'/>"),
    ("clock", "@offset", "<clock offset='localtime'/>", "<clock offset='variable'/>"),
    (
        "clock",
        "@timezone",
        "<clock offset='timezone' timezone='CET'/>",
        "<clock offset='utc' timezone='CET'/>",
    ),
    ("clock", "@start", "<clock offset='absolute' start='5'/>", "<clock offset='utc' start='5'/>"),
    ("clock", "@adjustment", "<clock adjustment='reset'/>", "<clock adjustment='3600'/>"),
    ("clock", "timer", "<timer name='hpet' present='yes'/>", "<timer name='hpet' present='x'/>"),
    ("clock", "timer", "<timer name='rtc' tickpolicy='catchup'/>", "<timer name='rtc' tickpolicy='merge'/>"),
    ("clock", "timer", "<timer name='tsc' frequency='3000000000'/>", "<timer name='tsc' mode='smpsafe'/>"),
    (
        "devices",
        "controller",
        "<controller type='scsi' model='virtio-scsi'/>",
        "<controller type='scsi' model='ibmvscsi'/>",
    ),
    (
        "devices",
        "controller",
        "<controller type='usb' model='qemu-xhci' ports='15'/>",
        "<controller type='ccid' index='1'/>",
    ),
    ("devices", "input", "<input type='tablet' bus='usb'/>", "<input type='joystick' bus='usb'/>"),
    ("devices", "input", "<input type='mouse' bus='virtio'/>", "<input type='tablet' bus='ps2'/>"),
    ("devices", "hub", "<hub type='usb'/>", "<hub type='other'/>"),
    ("devices", "panic", "<panic model='isa'/>", "<panic model='pseries'/>"),
    ("devices", "panic", "<panic model='hyperv'/>", "<panic model='hyperv'><address type='isa'/></panic>"),
    ("devices", "watchdog", "<watchdog model='ib700'/>", "<watchdog model='itco'/>"),
    (
        "devices",
        "graphics",
        "<graphics type='vnc' port='-1' autoport='yes'><listen type='address' address='127.0.0.1'/></graphics>",
        "<graphics type='vnc'><listen type='socket'/></graphics>",
    ),
    (
        "devices",
        "video",
        "<video><model type='virtio' heads='1'/></video>",
        "<video><model type='vga'><acceleration accel3d='yes'/></model></video>",
    ),
    ("devices", "audio", "<audio id='1' type='none'/>", "<audio id='1' type='alsa'/>"),
    ("devices", "memory", "<memory model='dimm'/>", "<memory model='nvdimm'/>"),
    (
        "devices",
        "redirdev",
        "<redirdev bus='usb' type='spicevmc'/>",
        "<redirdev bus='usb' type='spicevmc'><boot order='2'/></redirdev>",
    ),
    ("devices", "memballoon", "<memballoon model='none'/>", "<memballoon model='xen'/>"),
    (
        "devices",
        "memballoon",
        "<memballoon model='virtio'><driver iommu='on' packed='off'/></memballoon>",
        "<memballoon model='virtio'><driver speed='on'/></memballoon>",
    ),
    (
        "devices",
        "controller",
        "<controller type='virtio-serial'><driver ats='on'/></controller>",
        "<controller type='sata'><driver ats='on'/></controller>",
    ),
    ("devices", "video", "<video><driver name='qemu'/></video>", "<video><driver name='vhostuser'/></video>"),
    (
        "devices",
        "input",
        "<input type='mouse' bus='virtio'><driver ats='on'/></input>",
        "<input type='mouse' bus='usb'><driver ats='on'/></input>",
    ),
    (
        "devices",
        "rng",
        "<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>",
        "<rng model='virtio'><backend model='random'>/dev/hwrng</backend></rng>",
    ),
    (
        "devices",
        "tpm",
        "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>",
        "<tpm model='tpm-spapr'><backend type='emulator'/></tpm>",
    ),
    ("disk", "@model", "<disk model='virtio'/>", "<disk model='virtio-transitional'/>"),
    ("disk", "@snapshot", "<disk snapshot='no'><readonly/></disk>", "<disk snapshot='external'/>"),
    ("disk", "@rawio", "<disk rawio='no'/>", "<disk rawio='yes'/>"),
    ("disk", "@sgio", "<disk sgio='filtered'/>", "<disk sgio='unfiltered'/>"),
    (
        "disk",
        "driver",
        "<driver name='qemu' type='raw' cache='none' io='native' discard='unmap'/>",
        "<driver name='qemu' discard_no_unref='on'/>",
    ),
    ("disk", "source", "<source file='/x'/>", "<source file='/x' startupPolicy='requisite'/>"),
    ("disk", "blockio", "<blockio logical_block_size='512'/>", "<blockio discard_granularity='4096'/>"),
    ("disk", "target", "<target dev='vda' rotation_rate='1'/>", "<target dev='sda' removable='maybe'/>"),
    (
        "disk",
        "backingStore",
        "<backingStore/>",
        "<backingStore type='file'><source file='/base'/></backingStore>",
    ),
    (
        "interface",
        "@trustGuestRxFilters",
        "<interface trustGuestRxFilters='no'/>",
        "<interface trustGuestRxFilters='yes'/>",
    ),
    ("interface", "mac", "<mac address='52:54:00:00:00:01'/>", "<mac type='other'/>"),
    ("interface", "source", "<source network='n' portgroup='p'/>", "<source network='n' portgroup=''/>"),
    ("interface", "driver", "<driver name='vhost' ats='on'/>", "<driver name='vhost' queues='4'/>"),
    ("interface", "driver", "<driver><host csum='off'/></driver>", "<driver><other/></driver>"),
    ("interface", "rom", "<rom enabled='no'/>", "<rom file='/rom'/>"),
    (
        "interface",
        "bandwidth",
        "<bandwidth><inbound average='1000' peak='2000' burst='512'/></bandwidth>",
        "<bandwidth><inbound average='1000' floor='2000'/></bandwidth>",
    ),
    ("interface", "boot", "<boot order='1'/>", "<boot order='1' loadparm='x'/>"),
];

/// What becomes of an element of a table's kind, or of one with this in it.
fn taken(table: &str, row: &str, text: &str) -> Result<(), VirError> {
    let given = document(text).unwrap();
    let rows = TABLES.iter().find(|(name, _)| *name == table).unwrap().1;
    let whole = if row.starts_with('@') { given } else { Element::new(table.to_owned()).child(given) };
    check(&whole, "", rows)
}

#[test]
fn every_row_does_what_it_says() {
    for (table, rows) in TABLES {
        for (n, (row, rule, why)) in rows.iter().enumerate() {
            assert!(rows[..n].iter().all(|(known, _, _)| known != row), "{table} {row} is there twice");
            let samples: Vec<_> = SAMPLES.iter().filter(|s| (s.0, s.1) == (*table, *row)).collect();
            let bare = row.trim_start_matches('@');
            let plain = match row.strip_prefix('@') {
                Some(attribute) => format!("<{table} {attribute}='x'/>"),
                None => format!("<{row}/>"),
            };
            match rule {
                Kept => {
                    assert!(samples.is_empty() && why.is_empty(), "{table} {row} is kept, whatever it says");
                    assert_eq!(taken(table, row, &plain), Ok(()), "{table} {row}");
                }
                When(_) => {
                    assert!(!samples.is_empty() && !why.is_empty(), "{table} {row} has no sample");
                    for (_, _, good, bad) in samples {
                        assert_eq!(taken(table, row, good), Ok(()), "{good}");
                        let e = taken(table, row, bad).unwrap_err();
                        assert!(
                            e.code == Code::ConfigUnsupported && e.text.starts_with(bare),
                            "{bad}: {e:?}"
                        );
                    }
                }
                Never => {
                    assert!(samples.is_empty() && !why.is_empty(), "{table} {row} is always refused");
                    let e = taken(table, row, &plain).unwrap_err();
                    assert!(e.code == Code::ConfigUnsupported && e.text.starts_with(bare), "{row}: {e:?}");
                }
            }
        }
    }
    for (table, row, ..) in SAMPLES {
        let rows = TABLES.iter().find(|(name, _)| name == table).unwrap().1;
        assert!(rows.iter().any(|(known, _, _)| known == row), "{table} {row} has a sample and no row");
    }
}

#[test]
fn what_no_row_names_is_refused() {
    for (text, word) in [
        ("<domain><teleport/></domain>", "teleport: "),
        ("<domain><os><teleport/></os></domain>", "os teleport: "),
        ("<domain><devices><teleport/></devices></domain>", "teleport: "),
        ("<domain><devices><disk><teleport/></disk></devices></domain>", "disk teleport: "),
        ("<domain><devices><disk teleport='yes'/></devices></domain>", "disk teleport: "),
        ("<domain><devices><memballoon/><memballoon/></devices></domain>", "memballoon: a machine has one"),
    ] {
        let e = domain(&document(text).unwrap()).unwrap_err();
        assert!(e.code == Code::ConfigUnsupported && e.text.starts_with(word), "{e:?}");
    }
}
