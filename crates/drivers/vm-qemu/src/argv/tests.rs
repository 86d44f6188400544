//! Arguments of machines, whole.

use super::*;
use crate::{
    devices::{MAX_LOWER, tests::disk},
    directories::tests::directory,
};
use karst_guest::DiskFormat;
use karst_model::{
    device::{Device, HostDevice, NicModel, PortDevice, PortEnd, PortPlace},
    spec::{GivenSpec, LineSpec},
    threads::IoThread,
};

pub(crate) fn machine() -> Machine {
    Machine {
        name: "0b3c1f9e-7f2c-4d0a-9a53-3a3f6f0f0001".into(),
        spec: karst_guest::samples::machine(0x42),
        accelerator: AcceleratorKind::Tcg,
        cpus: 2,
        max_cpus: 4,
        memory: 1 << 30,
        disks: vec![Disk { pci: Some("00:04.0".into()), format: DiskFormat::Qcow2, ..disk("virtio0") }],
        directories: vec![],
        nics: vec![Nic {
            name: "eth0".into(),
            slot: "net0".into(),
            model: NicModel::Virtio,
            mac: "10:66:6a:12:34:56".into(),
            pci: Some("00:08.0".into()),
            mtu: None,
            boot_priority: 0,
            user: false,
            options: Default::default(),
        }],
        seed: true,
        firmware_code: None,
        hold: false,
        spice: false,
        own_cid: 7,
    }
}

fn lines(m: &Machine) -> String {
    let mut out = String::new();
    for a in argv(m).unwrap() {
        out.push_str(if a.starts_with('-') && !out.is_empty() { "\n" } else { " " });
        out.push_str(&a);
    }
    out.trim_start().to_owned()
}

#[test]
fn a_bios_guest_under_tcg() {
    insta::assert_snapshot!(lines(&machine()));
}

#[test]
fn system_management_mode_is_there_where_something_needs_it() {
    let mode = |change: &dyn Fn(&mut Machine)| {
        let mut m = machine();
        (m.spec.display, m.spec.ports) = (true, 16);
        change(&mut m);
        lines(&m).contains(",smm=on")
    };
    // Text on the screen, which SeaBIOS on q35 would otherwise write beside it.
    assert!(mode(&|_| {}));
    assert!(!mode(&|m| m.spec.display = false));
    assert!(!mode(&|m| m.spec.machine = "pc-i440fx-7.2".into()));
    let uefi = |m: &mut Machine, firmware| {
        m.spec.firmware = firmware;
        m.firmware_code = Some("/usr/share/OVMF/OVMF_CODE_4M.fd".into());
    };
    assert!(!mode(&|m| uefi(m, Firmware::Uefi)));
    assert!(mode(&|m| uefi(m, Firmware::UefiSecure)));
}

#[test]
fn a_uefi_guest_under_kvm_on_a_block_device_behind_scsi() {
    let mut m = machine();
    m.accelerator = AcceleratorKind::Kvm;
    m.spec.cpu_model = "host".into();
    m.spec.firmware = Firmware::UefiSecure;
    m.firmware_code = Some("/usr/share/OVMF/OVMF_CODE_4M.secboot.fd".into());
    m.spec.ports = 16;
    m.disks = vec![Disk { block_device: true, boot_priority: 1, ..disk("scsi0") }];
    m.disks.push(Disk { pci: Some("01:00.0".into()), ..disk("nvme0") });
    m.disks.push(Disk { cdrom: true, readonly: true, ejected: true, ..disk("sata0") });
    m.nics.push(Nic {
        name: "eth1".into(),
        slot: "net1".into(),
        model: NicModel::E1000e,
        pci: Some("02:00.0".into()),
        mtu: Some(1400),
        boot_priority: 5,
        user: false,
        options: Default::default(),
        mac: "10:66:6a:12:34:57".into(),
    });
    m.seed = false;
    insta::assert_snapshot!(lines(&m));
}

#[test]
fn encrypted_disks_are_opened_by_what_a_descriptor_has() {
    let mut m = machine();
    m.disks.push(Disk { encrypted: true, ..disk("scsi1") });
    m.disks.push(Disk { encrypted: true, block_device: true, readonly: true, ..disk("scsi2") });
    let all = argv(&m).unwrap();
    let at = |text: &str| all.iter().position(|a| a == text).unwrap_or_else(|| panic!("{text} in {all:?}"));
    for (slot, number) in [("scsi1", 601), ("scsi2", 602)] {
        let key =
            at(&format!("{{\"qom-type\":\"secret\",\"id\":\"k-{slot}\",\"file\":\"/dev/fd/{number}\"}}"));
        let node = all.iter().position(|a| a.contains(&format!("\"node-name\":\"i-{slot}\"")));
        let node = node.unwrap();
        assert!(key < node && all[key - 1] == "-object", "{all:?}");
        let image: serde_json::Value = serde_json::from_str(&all[node]).unwrap();
        assert_eq!(image["driver"], "luks");
        assert_eq!(image["key-secret"], format!("k-{slot}").as_str());
        assert_eq!(image["file"], format!("f-{slot}").as_str());
        assert!(image.get("detect-zeroes").is_none() && image.get("backing").is_none(), "{image}");
    }
    // The first one is not.
    assert!(!all.iter().any(|a| a.contains("\"k-virtio0\"")));
    m.disks[1].format = DiskFormat::Qcow2;
    assert_eq!(argv(&m).unwrap_err().field.as_deref(), Some("devices.data.encryption.secret"));
}

#[test]
fn floppy_disks_and_disks_on_usb() {
    let mut m = machine();
    let place = |kind: &str| Disk { pci: None, ..disk(kind) };
    m.disks.extend([place("floppy0"), place("usb3")]);
    assert_eq!(argv(&m).unwrap_err().field.as_deref(), Some("config.hardware.usb"));
    let keys = [("hardware.usb".to_owned(), "qemu-xhci".to_owned())];
    m.spec.board = karst_model::board::Board::of(&keys.into()).unwrap();
    let has = |m: &Machine, text: &str| argv(m).unwrap().iter().any(|a| a.contains(text));
    assert!(
        has(&m, "\"driver\":\"isa-fdc\"") && has(&m, "\"driver\":\"usb-storage\",\"bus\":\"usb0.0\"")
            || has(&m, "usb-storage")
    );
    m.spec.machine = "pc-i440fx-7.2".into();
    assert!(!has(&m, "\"driver\":\"isa-fdc\""));
}

#[test]
fn what_is_not_as_usual_is_said() {
    let mut m = machine();
    let before = argv(&m).unwrap();
    let keys = [
        ("hardware.features", "vmcoreinfo,hyperv-panic,tpm-tis,rtc-realtime,tseg=48,tcg-cache=100"),
        ("hardware.rng", "plain,rate=1024/1000+iommu"),
        ("hardware.virtio", "balloon=ats,scsi=packed,serial=iommu"),
        ("hardware.sound", "pcspk"),
        ("hardware.clock.start", "253402300799"),
    ];
    let keys = keys.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned()));
    m.spec.board = karst_model::board::Board::of(&keys.collect()).unwrap();
    (m.spec.balloon, m.spec.tpm, m.spec.ports) = (true, true, 16);
    let after = argv(&m).unwrap();
    for text in [
        "dump-guest-core=off,smm=on,pcspk-audiodev=audio",
        "tcg,thread=multi,tb-size=100",
        "mch.extended-tseg-mbytes=48",
        "base=9999-12-31T23:59:59,clock=rt",
        "{\"driver\":\"vmcoreinfo\"",
        "{\"driver\":\"tpm-tis\"",
        "rng-random,id=rng1,filename=/dev/urandom",
        "\"max-bytes\":1024,\"period\":1000,\"iommu_platform\":true",
        "\"id\":\"balloon\",\"free-page-reporting\":true,\"ats\":true",
        "\"id\":\"scsi\",\"packed\":true",
        "\"max_ports\":16,\"iommu_platform\":true",
    ] {
        assert!(after.iter().any(|a| a.contains(text)), "{text} in {after:?}");
        assert!(!before.iter().any(|a| a.contains(text)), "{text} in {before:?}");
    }
    // Of Hyper-V's there is nothing without KVM.
    let crashes = |m: &Machine| argv(m).unwrap().iter().any(|a| a.contains(",hv-crash"));
    assert!(!crashes(&m));
    m.accelerator = AcceleratorKind::Kvm;
    assert!(crashes(&m));
    m.spec.machine = "pc-i440fx-7.2".into();
    assert_eq!(argv(&m).unwrap_err().field.as_deref(), Some("config.hardware.features"));
}

#[test]
fn a_machine_for_windows() {
    let mut m = machine();
    m.accelerator = AcceleratorKind::Kvm;
    m.spec.cpu_model = "host".into();
    m.spec.firmware = Firmware::UefiSecure;
    m.firmware_code = Some("/usr/share/OVMF/OVMF_CODE_4M.secboot.fd".into());
    m.spec.ports = 16;
    (m.spec.tpm, m.spec.display) = (true, true);
    m.disks = vec![disk("sata0"), Disk { cdrom: true, readonly: true, ..disk("sata1") }];
    m.nics[0] = Nic { model: NicModel::E1000e, pci: Some("01:00.0".into()), ..m.nics[0].clone() };
    let plain = lines(&m);
    m.spec.windows = true;
    m.spec.local_time = true;
    let text = lines(&m);
    let changed: Vec<&str> = text.lines().filter(|l| !plain.lines().any(|p| p == *l)).collect();
    assert_eq!(text.lines().count(), plain.lines().count());
    insta::assert_snapshot!(changed.join("\n"), @r"
    -cpu host,hv-relaxed,hv-vapic,hv-spinlocks=0x1fff,hv-vpindex,hv-runtime,hv-synic,hv-stimer,hv-time,hv-frequencies,hv-reset,hv-tlbflush,hv-ipi
    -rtc base=localtime
    ");
    // What its installer has drivers for, and what its newer ones demand.
    for part in
        [r#""bus":"ide.0""#, r#""bus":"ide.1""#, r#""driver":"e1000e""#, r#""driver":"tpm-crb""#, "smm=on"]
    {
        assert!(text.contains(part), "{part}: {text}");
    }
    // Emulated, there is no Hyper-V.
    m.accelerator = AcceleratorKind::Tcg;
    assert!(!lines(&m).contains("hv-"));
}

#[test]
fn a_clone_names_the_file_below_it() {
    let mut m = machine();
    m.disks[0].cloned = true;
    let text = lines(&m);
    assert!(text.contains("fd=41,opaque=base") && text.contains(r#""backing":"b-virtio0""#), "{text}");
}

#[test]
fn disks_are_served_by_threads_that_are_made_before() {
    let mut m = machine();
    m.spec.iothreads = vec![IoThread::new(1), IoThread { poll_grow: Some(2), ..IoThread::new(4) }];
    m.spec.scsi_iothread = Some(4);
    m.disks[0].thread = Some(1);
    m.disks.push(disk("scsi1"));
    let text = lines(&m);
    let objects = "-object {\"qom-type\":\"iothread\",\"id\":\"iothread1\"}\n\
        -object {\"qom-type\":\"iothread\",\"id\":\"iothread4\",\"poll-grow\":2}";
    let at = |part: &str| text.find(part).unwrap_or_else(|| panic!("{part}: {text}"));
    let controller = "\"driver\":\"virtio-scsi-pci\",\"id\":\"scsi\",\"iothread\":\"iothread4\"";
    assert!(at(objects) < at(controller) && at(controller) < at("\"iothread\":\"iothread1\""));
    m.disks[1].thread = Some(1);
    assert_eq!(argv(&m).unwrap_err().field.as_deref(), Some("devices.data.io.thread"));
    m.disks.pop();
    m.spec.iothreads = (1..=65).map(IoThread::new).collect();
    assert_eq!(argv(&m).unwrap_err().field.as_deref(), Some("config.hardware.iothreads"));
}

#[test]
fn directories_are_descriptors_with_a_tag() {
    let mut m = machine();
    let first = Directory { pci: Some("00:09.0".into()), ..directory("data", "fs0") };
    let second = Directory {
        pci: Some("00:0a.0".into()),
        readonly: true,
        foreign: true,
        ..directory("config", "fs1")
    };
    m.directories = vec![(first, Way::Plan9 { mapped: true }), (second, Way::Plan9 { mapped: false })];
    let text = lines(&m);
    let from = text.find("-fsdev local,id=directory-fs0").unwrap();
    let shown: Vec<&str> = text[from..].lines().take(4).collect();
    assert_eq!(
        shown.join("\n"),
        "-fsdev local,id=directory-fs0,path=/proc/self/fd/200,security_model=mapped-xattr,multidevs=remap\n\
         -device {\"driver\":\"virtio-9p-pci\",\"id\":\"directory-fs0\",\"fsdev\":\"directory-fs0\",\
         \"mount_tag\":\"data\",\"disable-legacy\":\"on\",\"bus\":\"pcie.0\",\"addr\":\"0x9.0x0\"}\n\
         -fsdev local,id=directory-fs1,path=/proc/self/fd/201,security_model=none,multidevs=remap,readonly=on\n\
         -device {\"driver\":\"virtio-9p-pci\",\"id\":\"directory-fs1\",\"fsdev\":\"directory-fs1\",\
         \"mount_tag\":\"karst-fs1\",\"disable-legacy\":\"on\",\"bus\":\"pcie.0\",\"addr\":\"0xa.0x0\"}"
    );
    // Neither the path of the host nor the place inside is QEMU's to know.
    assert!(!text.contains("/srv/data") && !text.contains("/mnt/data"), "{text}");
    // One that is served by another process: a connection to it, and memory that it is handed.
    let without: Vec<String> = text.lines().map(str::to_owned).collect();
    m.directories[0].1 = Way::Virtiofs;
    let served = lines(&m);
    assert!(served.contains("virtio-9p-pci\",\"id\":\"directory-fs1\""), "the other stays: {served}");
    let new: Vec<&str> = served.lines().filter(|l| !without.iter().any(|w| w == l)).collect();
    let machine = without.iter().find(|l| l.starts_with("-machine")).unwrap();
    assert_eq!(
        new.join("\n"),
        format!("{machine},memory-backend=memory\n")
            + "-object {\"qom-type\":\"memory-backend-memfd\",\"id\":\"memory\",\"size\":1073741824,\"share\":true}\n\
               -chardev socket,id=directory-fs0,fd=200\n\
               -device {\"driver\":\"vhost-user-fs-pci\",\"id\":\"directory-fs0\",\"chardev\":\"directory-fs0\",\
               \"tag\":\"data\",\"queue-size\":1024,\"bus\":\"pcie.0\",\"addr\":\"0x9.0x0\"}"
    );
    let many = (0..17).map(|n| (directory("data", &format!("fs{n}")), Way::Plan9 { mapped: false }));
    m.directories = many.collect();
    assert_eq!(argv(&m).unwrap_err().field.as_deref(), Some("devices"));
}

#[test]
fn devices_of_the_host_have_a_controller_and_come_after_the_ports_that_they_are_at() {
    let mut m = machine();
    m.spec.ports = 16;
    m.disks[0].pci = Some("01:00.0".into());
    m.nics[0].pci = Some("02:00.0".into());
    let keys =
        |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    let of = |name: &str, pairs: &[(&str, &str)], pci: Option<&str>| {
        let device = match Device::parse(name, &keys(pairs)).unwrap() {
            Device::Usb(device) => HostDevice::Usb(device),
            Device::Input(device) => HostDevice::Input(device),
            other => panic!("{other:?}"),
        };
        GivenSpec { name: name.into(), device, pci: pci.map(str::to_owned) }
    };
    let stick = of("stick", &[("type", "usb"), ("vendorid", "046d")], None);
    let mouse = of("mouse", &[("type", "input"), ("source", "/dev/input/event3")], Some("03:00.0"));
    m.spec.given = vec![stick, mouse];
    let text = lines(&m);
    assert!(text.starts_with("-add-fd set="), "{text}");
    assert!(text.contains("-add-fd set=3000,fd=400,opaque=given"), "{text}");
    let at = |what: &str| text.find(what).unwrap_or_else(|| panic!("{what}: {text}"));
    assert!(at(r#""id":"port3""#) < at(r#""driver":"virtio-input-host-pci""#));
    let controller = r#"{"driver":"qemu-xhci","id":"usb","p2":8,"p3":8"#;
    assert!(at(controller) < at(r#""driver":"usb-host""#));
    assert!(!text.contains("/dev/input"), "{text}");
    m.spec.board.usb.push(karst_model::board::UsbController {
        model: karst_model::board::UsbModel::QemuXhci,
        ports: None,
    });
    assert!(!lines(&m).contains(controller), "it has one");
}

#[test]
fn devices_behind_ports_are_after_what_they_are_at() {
    let mut m = machine();
    let line = |name: &str, place: PortPlace, to: PortEnd| LineSpec {
        name: name.into(),
        device: PortDevice { place, to, log: None },
    };
    let usual = lines(&m);
    assert!(!usual.contains("qemu-xhci") && usual.matches("virtio-rng-pci").count() == 1, "{usual}");
    m.spec.lines = vec![
        line("numbers", PortPlace::Random {}, PortEnd::Stream {}),
        line("stick", PortPlace::Redirect {}, PortEnd::Stream {}),
    ];
    m.spec.board.usb_filter = Some("0x08:-1:-1:-1:0".into());
    let text = lines(&m);
    let at = |what: &str| text.find(what).unwrap_or_else(|| panic!("{what}: {text}"));
    assert!(at(r#""driver":"qemu-xhci""#) < at(r#""driver":"usb-redir""#));
    assert!(text.contains(r#""chardev":"port-stick","filter":"0x08:-1:-1:-1:0""#), "{text}");
    assert!(at(r#""qom-type":"rng-egd""#) < at(r#""rng":"port-numbers-numbers""#));
    assert!(text.contains(r#""rng":"rng0","multifunction":true"#), "there is one beside it: {text}");
    // With SPICE its own devices are taken by the same filter.
    m.spice = true;
    assert_eq!(lines(&m).matches(r#""filter":"0x08:-1:-1:-1:0""#).count(), 4);
}

#[test]
fn an_i440fx_machine_has_its_devices_on_its_one_bus() {
    let mut m = machine();
    m.spec.machine = "pc-i440fx-7.2".into();
    m.disks.push(disk("sata1"));
    let text = lines(&m);
    assert!(!text.contains("pcie") && !text.contains("ICH9-LPC"), "{text}");
    assert!(text.contains(r#""bus":"sata.1""#) && text.contains(r#""id":"scsi""#), "{text}");
}

#[test]
fn strings_of_the_firmware_are_in_no_argument() {
    let mut m = machine();
    m.spec.strings = vec!["role=web".into(), "io.systemd.credential:key=sesame".into()];
    let args = argv(&m).unwrap();
    let named: Vec<_> = args.iter().filter(|a| a.starts_with("type=11")).collect();
    assert_eq!(named, ["type=11,path=/proc/self/fd/240", "type=11,path=/proc/self/fd/241"]);
    assert!(!args.iter().any(|a| a.contains("sesame") || a.contains("role")), "{args:?}");
    m.spec.strings = vec!["a=b".into(); MOST_STRINGS + 1];
    assert_eq!(argv(&m).unwrap_err().field.as_deref(), Some("config.smbios11"));
}

#[test]
fn a_machine_that_crashes_halts_where_it_is_to() {
    let mut m = machine();
    let halts = |m: &Machine| argv(m).unwrap().windows(2).any(|w| w == ["-action", "panic=pause"]);
    assert!(!halts(&m));
    m.spec.halts_on_crash = true;
    assert!(halts(&m));
}

#[test]
fn a_kernel_is_named_by_its_descriptor_and_its_line_is_one_argument() {
    let mut m = machine();
    m.spec.ends_on_reboot = true;
    m.spec.kernel = Some(karst_model::spec::KernelSpec {
        name: "boot".into(),
        kernel: karst_model::spec::DiskSource::Host { path: "/etc/shadow".into() },
        initrd: None,
        cmdline: Some("console=ttyS0 a,b=c -kernel /x".into()),
    });
    let args = argv(&m).unwrap();
    let after = |name: &str| args.iter().position(|a| a == name).map(|n| args[n + 1].as_str());
    assert_eq!(after("-kernel"), Some("/proc/self/fd/16"));
    assert_eq!((after("-initrd"), after("-append")), (None, Some("console=ttyS0 a,b=c -kernel /x")));
    assert!(args.iter().any(|a| a == "-no-reboot") && !args.iter().any(|a| a.contains("shadow")));
    m.spec.kernel.as_mut().unwrap().cmdline = Some("a\nb".into());
    assert_eq!(argv(&m).unwrap_err().field.as_deref(), Some("devices.boot.cmdline"));
}

#[test]
fn a_screen_listens_nowhere_however_it_is_served() {
    let mut m = machine();
    m.spec.display = true;
    let has = |m: &Machine, text: &str| lines(m).lines().any(|line| line == text);
    assert!(has(&m, "-vnc none,password=on") && !lines(&m).contains("\n-k "));
    m.spec.screen = ScreenOptions {
        share: Some("force-shared".into()),
        power_control: true,
        keymap: Some("de-ch".into()),
    };
    assert!(has(&m, "-vnc none,password=on,share=force-shared,power-control=on"), "{}", lines(&m));
    assert!(has(&m, "-k de-ch"));
    m.spec.screen.keymap = Some("de,x".into());
    assert_eq!(argv(&m).unwrap_err().field.as_deref(), Some("config.screen.keymap"));
}

#[test]
fn spice_listens_nowhere_and_what_the_guest_has_of_it_does_not_hang_on_the_host() {
    const VGA: &str =
        r#"-device {"driver":"VGA","id":"video","vgamem_mb":16,"bus":"pcie.0","addr":"0x1b.0x0"}"#;
    let mut m = machine();
    m.spec.display = true;
    let without = lines(&m);
    assert!(!without.contains("spice") && !without.contains("xhci"), "{without}");
    // Wanted of a QEMU that has none: the port alone, with nobody behind it.
    m.spec.spice = true;
    let wanted = lines(&m);
    let port = "-device {\"driver\":\"virtserialport\",\"bus\":\"serial0.0\",\"nr\":5,\"id\":\"vdagent\",\
         \"name\":\"com.redhat.spice.0\"";
    assert_eq!(wanted, without.replacen(VGA, &format!("{VGA}\n{port}}}"), 1));
    m.spice = true;
    let text = lines(&m);
    let from = text.find(port).unwrap();
    let shown: Vec<&str> = text[from..].lines().take(11).collect();
    assert_eq!(
        shown.join("\n"),
        format!("{port},\"chardev\":\"vdagent\"}}\n")
            + "-spice port=0,streaming-video=off,seamless-migration=off\n\
               -chardev spicevmc,id=vdagent,name=vdagent\n\
               -device {\"driver\":\"qemu-xhci\",\"id\":\"usb\",\"bus\":\"pcie.0\",\"addr\":\"0x1e.0x0\"}\n\
               -device {\"driver\":\"usb-tablet\",\"id\":\"tablet\",\"bus\":\"usb.0\",\"port\":\"1\"}\n\
               -chardev spicevmc,id=redirect0,name=usbredir\n\
               -device {\"driver\":\"usb-redir\",\"id\":\"redirect0\",\"chardev\":\"redirect0\",\"bus\":\"usb.0\",\"port\":\"2\"}\n\
               -chardev spicevmc,id=redirect1,name=usbredir\n\
               -device {\"driver\":\"usb-redir\",\"id\":\"redirect1\",\"chardev\":\"redirect1\",\"bus\":\"usb.0\",\"port\":\"3\"}\n\
               -chardev spicevmc,id=redirect2,name=usbredir\n\
               -device {\"driver\":\"usb-redir\",\"id\":\"redirect2\",\"chardev\":\"redirect2\",\"bus\":\"usb.0\",\"port\":\"4\"}"
    );
    m.spec.machine = "pc-i440fx-7.2".into();
    assert!(lines(&m).contains(r#""id":"usb","bus":"pci.0","addr":"0x1e.0x0""#));
}

#[test]
fn the_clock_and_what_hyper_v_says_are_chosen_apart() {
    let mut m = machine();
    m.accelerator = AcceleratorKind::Kvm;
    let says = |m: &Machine| {
        let text = lines(m);
        (text.contains("-rtc base=localtime"), text.contains("hv-relaxed"))
    };
    assert_eq!(says(&m), (false, false));
    m.spec.local_time = true;
    assert_eq!(says(&m), (true, false));
    m.spec.windows = true;
    assert_eq!(says(&m), (true, true));
    // TCG knows none of it.
    m.accelerator = AcceleratorKind::Tcg;
    assert_eq!(says(&m), (true, false));
}

#[test]
fn descriptor_numbers_differ() {
    let mut all = vec![
        fd::TPM,
        fd::LINK,
        fd::SHARE,
        fd::QMP,
        fd::EVENTS,
        fd::AGENT,
        fd::CONSOLE,
        fd::SEED,
        fd::VARS,
        fd::KERNEL,
        fd::INITRD,
        fd::MEMORY,
    ];
    all.extend((0..MAX_NICS as i32).map(|i| fd::NIC + i));
    all.extend((0..MOST_STRINGS as i32).map(|i| fd::STRINGS + i));
    all.extend((0..2 * MAX_DISKS as i32).map(|i| fd::DISK + i));
    all.extend((0..MAX_DIRECTORIES as i32).map(|i| fd::DIRECTORY + i));
    all.extend((0..MAX_LOWER as i32).map(|i| fd::LAYER + i));
    all.extend((0..2 * crate::ports::MOST as i32).map(|i| fd::PORT + i));
    all.extend((0..crate::given::MOST as i32).map(|i| fd::GIVEN + i));
    all.extend((0..MAX_DISKS as i32).map(|i| fd::KEY + i));
    let n = all.len();
    all.sort_unstable();
    all.dedup();
    assert_eq!(all.len(), n);
}

#[test]
fn a_disk_in_layers_has_a_descriptor_of_each_of_its_files() {
    let mut m = machine();
    (m.disks[0].layer, m.disks[0].below) = (4, vec![(2, DiskFormat::Qcow2), (0, DiskFormat::Raw)]);
    let text = argv(&m).unwrap().join(" ");
    let (first, _) = m.disks[0].fd_sets().unwrap();
    for (layer, number, name) in [(4, fd::DISK, "disk"), (2, fd::LAYER, "layer"), (0, fd::LAYER + 1, "layer")]
    {
        let set = format!("set={},fd={number},opaque={name}", layer_set(first, layer));
        assert!(text.contains(&set), "{set} in {text}");
    }
    assert!(
        text.contains(r#""backing":"i-virtio0.l2""#) && text.contains(r#""file":"i-virtio0.l4""#),
        "{text}"
    );
}

#[test]
fn what_documents_wish_is_in_the_arguments() {
    let mut m = machine();
    let keys = [
        ("hardware.scsi", "virtio-scsi+queues=2,lsilogic"),
        ("hardware.memory", "locked"),
        ("hardware.main_thread.pool", "8-16"),
        ("hardware.smbios.system.product", "A, B"),
        ("hardware.video.render", "/dev/dri/renderD128"),
    ];
    let keys = keys.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned()));
    m.spec.board = karst_model::board::Board::of(&keys.collect()).unwrap();
    let text = lines(&m);
    for wanted in [
        "-display egl-headless,rendernode=/dev/dri/renderD128",
        "-overcommit mem-lock=on",
        ",memory-backend=memory",
        "-smbios type=1,manufacturer=Karst,product=A,, B,uuid=",
        r#"-object {"qom-type":"main-loop","id":"main-loop","thread-pool-min":8,"thread-pool-max":16}"#,
        r#""id":"scsi","num_queues":2,"multifunction":true,"disable-legacy":"on""#,
        r#"-device {"driver":"lsi53c895a","id":"scsi1","#,
    ] {
        assert!(text.contains(wanted), "{wanted} in {text}");
    }
    m.disks[0].options.controller = Some(1);
    assert!(argv(&m).is_ok(), "of a disk that is not on SCSI it says nothing");
    m.disks[0].slot = "scsi0".into();
    m.disks[0].pci = None;
    assert!(lines(&m).contains(r#""bus":"scsi1.0""#));
    m.spec.board.scsi.clear();
    assert_eq!(argv(&m).unwrap_err().field.as_deref(), Some("devices.data.io.options"));
}

#[test]
fn nothing_slips_a_property_in() {
    let bad = |f: &dyn Fn(&mut Machine)| {
        let mut m = machine();
        f(&mut m);
        argv(&m).unwrap_err()
    };
    assert_eq!(bad(&|m| m.spec.machine = "q35".into()).field.unwrap(), "hardware.machine");
    assert_eq!(
        bad(&|m| m.spec.machine = "pc-q35-7.2,kernel=/etc/shadow".into()).field.unwrap(),
        "hardware.machine"
    );
    assert_eq!(
        bad(&|m| m.nics[0].mac = "10:66:6a:12:34:56,romfile=/x".into()).field.unwrap(),
        "devices.eth0.hwaddr"
    );
    for pci in ["00:00.0", "00:1f.0", "01:04.0", "00:04.8", "4", "00:04.0,x=y"] {
        assert_eq!(bad(&|m| m.disks[0].pci = Some(pci.into())).field.unwrap(), "devices.data", "{pci}");
    }
    assert_eq!(bad(&|m| m.memory = 1000).field.unwrap(), "config.limits.memory");
    assert!(bad(&|m| m.disks[0].format = DiskFormat::Directory).message.contains("disk image"));
}
