//! What the keys of options of a board mean.

/// `hardware.clock.start`.
pub const CLOCK_START: &str =
    "Seconds since 1970 that the clock of the hardware shows at each start, in place of the host's time.";
/// `hardware.clock.zone`.
pub const CLOCK_ZONE: &str =
    "Time zone that the clock of the hardware shows the time of, such as Europe/Paris.";
/// `hardware.features`.
pub const FEATURES: &str = "What is not as usual: vmcoreinfo, hyperv-panic (KVM), \
    split-irqchip (KVM), tpm-tis, rtc-realtime, dirty-ring=4096 (KVM), tseg=48 (MiB, q35), tcg-cache=100 (MiB, without KVM).";
/// `hardware.iommu`.
pub const IOMMU: &str = "An IOMMU of machines of type q35: virtio, or intel with intremap=on, eim=on (both with split-irqchip of \
    hardware.features), caching, iotlb, width=39, width=48.";
/// `hardware.main_thread.pool`.
pub const MAIN_POOL: &str =
    "Threads that QEMU's main one keeps for what blocks, and most of them, such as 8-16.";
/// `hardware.memory.modules`.
pub const MODULES: &str = "Modules of memory, each with its node: 512MiB@0;1GiB@1+slot=2+hugepages=2MiB+bind:0. With hardware.numa \
    they are limits.memory.";
/// `hardware.memory.slots`.
pub const SLOTS: &str = "Room for modules: how many, and all memory at most, such as 16:64GiB.";
/// `hardware.balloon.period`.
pub const PERIOD: &str =
    "Seconds after which the guest tells again of its memory, by its balloon; 0: it is not asked.";
/// `hardware.numa.distances`.
pub const DISTANCES: &str =
    "How far nodes of memory are from each other, such as 0-1=21,0-2=31; 20 unless it is said.";
/// `hardware.numa.host`.
pub const HOST: &str = "Nodes of the host on which those of the machine are, by bind, preferred or interleave: \
    0=bind:0-1;1=preferred:3.";
/// `hardware.numa.memory`.
pub const CELLS: &str = "How the memory of single nodes is had of the host, where not as hardware.memory says: \
    0=shared;1=private+hugepages=2MiB.";
/// `hardware.numa.placement`.
pub const PLACEMENT: &str = "What the host chooses its own nodes for at each start, those with the most free memory: cpu, memory or both.";
/// `hardware.numa.policy`.
pub const POLICY: &str = "How memory keeps to the nodes of limits.memory.nodes, or to those that are chosen: bind, preferred or interleave.";
/// `hardware.usb.filter`.
pub const USB_FILTER: &str = "Which devices on USB of a viewer's, or of who is at a port, are taken: rules CLASS:VENDOR:PRODUCT:VERSION:ALLOW, \
    of which the first that fits counts, such as 0x08:-1:-1:-1:1|-1:-1:-1:-1:0. Without any all are.";
/// `hardware.rng`.
pub const RNG: &str = "Where random numbers come from, each plain, or of rate=BYTES/MILLISECONDS, iommu, ats, packed, \
    page-per-queue, as in plain,rate=1024/1000+iommu.";
/// `hardware.scsi`.
pub const SCSI: &str = "Controllers of SCSI, the first of them virtio-scsi: virtio-scsi, lsilogic, lsisas1068, lsisas1078, vmpvscsi; of virtio \
    with queues=, per-disk=, sectors=, ioeventfd=off, iommu, ats, packed, page-per-queue, as in virtio-scsi,virtio-scsi+queues=4. Disks say \
    controller= in io.options.";
/// `hardware.smbios.*`.
pub const SMBIOS: &str = "What the firmware tells of the machine: bios.vendor, bios.version, bios.date, bios.release, system.manufacturer, \
    system.product, system.version, system.serial, system.sku, system.family, board.* and chassis.* alike, and strings, one a line.";
/// `hardware.sound`.
pub const SOUND: &str = "Sound cards: ac97, es1370, ich6, ich9, sb16, and pcspk, the speaker. They are heard by SPICE, else nowhere.";
/// `hardware.sound.codecs`.
pub const CODECS: &str = "Codecs of cards ich6 and ich9, by their place in hardware.sound from 0: duplex (the usual one), micro, output, \
    as in 0=micro+output.";
/// `hardware.video`.
pub const VIDEO: &str = "What screens are on: vga, cirrus, qxl, virtio, virtio-gl, vmvga, bochs, ramfb, none; further ones on qxl, virtio, virtio-gl or bochs.";
/// `hardware.video.render`.
pub const RENDER: &str = "Draws the screens with a graphics card of the host: auto, or a render node such as /dev/dri/renderD128. The host has to let \
    it: render_nodes in host-policy.toml.";
/// `hardware.virtio`.
pub const VIRTIO: &str = "What of the machine's own devices of virtio is not as usual, of balloon, scsi, serial, input0: iommu, ats, \
    packed, page-per-queue, as in balloon=iommu+ats,scsi=packed.";
