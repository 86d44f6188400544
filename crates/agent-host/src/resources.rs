//! The machine's hardware, read from `/proc` and `/sys`. Reads only; what is missing there is left empty.

use karst_agent::resources::{
    CpuCore, CpuSocket, CpuTimes, DiskResources, HostResources, MemoryResources, MergingResources,
    NetworkResources, PartitionResources, PciResources, SystemResources, UsbResources,
};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

/// Most of anything that is told: a host with more of them is answered, but not with a list without end.
const MOST: usize = 4096;

/// Where to look: the machine, or a tree that a test made.
pub(crate) struct Machine {
    proc: PathBuf,
    sys: PathBuf,
}

impl Default for Machine {
    fn default() -> Self {
        Self { proc: "/proc".into(), sys: "/sys".into() }
    }
}

fn text(path: impl AsRef<Path>) -> String {
    fs::read_to_string(path).map(|t| t.trim().to_owned()).unwrap_or_default()
}

fn number(path: impl AsRef<Path>) -> u64 {
    text(path).parse().unwrap_or_default()
}

/// Names in a directory, sorted; numbers by their value.
fn entries(path: impl AsRef<Path>) -> Vec<String> {
    let found = fs::read_dir(path).into_iter().flatten().flatten();
    let mut all: Vec<String> = found.filter_map(|e| e.file_name().into_string().ok()).take(MOST).collect();
    all.sort_by_key(|n| (n.trim_start_matches(|c: char| !c.is_ascii_digit()).parse::<u64>().ok(), n.clone()));
    all
}

/// Last part of where a link leads.
fn link(path: impl AsRef<Path>) -> String {
    let target = fs::read_link(path).ok();
    target.and_then(|t| Some(t.file_name()?.to_str()?.to_owned())).unwrap_or_default()
}

/// `512K` as the kernel writes sizes of caches.
fn kernel_size(text: &str) -> u64 {
    let digits = text.trim_end_matches(['K', 'M', 'G']);
    let unit = match text.as_bytes().last() {
        Some(b'K') => 1 << 10,
        Some(b'M') => 1 << 20,
        Some(b'G') => 1 << 30,
        _ => 1,
    };
    digits.parse::<u64>().unwrap_or_default() * unit
}

/// `Name: value` lines; values in kB become bytes.
fn kilobytes(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|l| l.split_once(name)?.1.strip_prefix(':'));
    let mut words = line.unwrap_or_default().split_whitespace();
    let value: u64 = words.next().and_then(|w| w.parse().ok()).unwrap_or_default();
    if words.next() == Some("kB") { value << 10 } else { value }
}

/// Nanoseconds of a tick: the kernel tells programs a hundred ticks a second, whatever it counts by itself.
const TICK: u64 = 10_000_000;

/// The lines of processors in `/proc/stat`: user, nice, system, idle, iowait, irq, softirq, in ticks.
fn cpu_times(stat: &str) -> Vec<CpuTimes> {
    let of = |line: &str| {
        let mut words = line.split_whitespace();
        let cpu = match words.next()?.strip_prefix("cpu")? {
            "" => None,
            number => Some(number.parse().ok()?),
        };
        let mut next = || words.next().and_then(|w| w.parse::<u64>().ok()).unwrap_or_default() * TICK;
        let [user, nice, system, idle, waiting, irq, softirq] = std::array::from_fn(|_| next());
        Some(CpuTimes { cpu, kernel: system + irq + softirq, user: user + nice, idle, waiting })
    };
    stat.lines().filter_map(of).take(MOST).collect()
}

impl Machine {
    /// All of it. Blocks for some milliseconds.
    pub(crate) fn resources(&self) -> HostResources {
        let load = text(self.proc.join("loadavg"));
        let mut words = load.split_whitespace();
        let mut average = || words.next().and_then(|w| w.parse().ok()).unwrap_or_default();
        let pci = self.pci();
        HostResources {
            sockets: self.cpu(),
            times: cpu_times(&text(self.proc.join("stat"))),
            memory: self.memory(),
            disks: self.disks(),
            network: self.network(&pci),
            pci,
            usb: self.usb(),
            system: self.system(),
            load: [average(), average(), average()],
            processes: entries(&self.proc).iter().filter(|n| n.bytes().all(|b| b.is_ascii_digit())).count()
                as u64,
        }
    }

    fn cpu(&self) -> Vec<CpuSocket> {
        let info = text(self.proc.join("cpuinfo"));
        let described: BTreeMap<u32, BTreeMap<&str, &str>> = info
            .split("\n\n")
            .filter_map(|block| {
                let fields: BTreeMap<&str, &str> = block
                    .lines()
                    .filter_map(|l| l.split_once(':'))
                    .map(|(k, v)| (k.trim(), v.trim()))
                    .collect();
                Some((fields.get("processor")?.parse().ok()?, fields))
            })
            .collect();
        let base = self.sys.join("devices/system/cpu");
        let mut sockets: BTreeMap<u32, CpuSocket> = BTreeMap::new();
        for name in entries(&base) {
            let Some(id) = name.strip_prefix("cpu").and_then(|n| n.parse::<u32>().ok()) else { continue };
            let at = base.join(&name);
            let said = described.get(&id);
            let field = |key: &str| said.and_then(|s| s.get(key)).copied().unwrap_or_default();
            let id_of = |file: &str| number(at.join("topology").join(file)) as u32;
            let (socket, core) = (id_of("physical_package_id"), id_of("core_id"));
            let node =
                entries(&at).into_iter().find_map(|e| e.strip_prefix("node")?.parse().ok()).unwrap_or(0);
            // The first cannot be taken offline and has no such file.
            let online = text(at.join("online")) != "0";
            let measured = field("cpu MHz").parse::<f64>().unwrap_or_default() as u64;
            let frequency = match number(at.join("cpufreq/scaling_cur_freq")) / 1000 {
                0 => measured,
                now => now,
            };
            let s = sockets.entry(socket).or_insert_with(|| CpuSocket {
                socket,
                vendor: field("vendor_id").to_owned(),
                name: field("model name").to_owned(),
                cache: self.caches(&at),
                ..CpuSocket::default()
            });
            s.frequency = s.frequency.max(frequency);
            let thread = (id, node, online);
            match s.cores.iter_mut().find(|c| c.core == core) {
                Some(known) => known.threads.push(thread),
                None => s.cores.push(CpuCore {
                    core,
                    frequency,
                    flags: field("flags").split_whitespace().map(str::to_owned).collect(),
                    threads: vec![thread],
                }),
            }
        }
        sockets.into_values().collect()
    }

    fn caches(&self, cpu: &Path) -> Vec<(u32, String, u64)> {
        let base = cpu.join("cache");
        let indices = entries(&base).into_iter().filter(|e| e.starts_with("index"));
        indices
            .map(|e| {
                let at = base.join(e);
                (number(at.join("level")) as u32, text(at.join("type")), kernel_size(&text(at.join("size"))))
            })
            .collect()
    }

    fn memory(&self) -> MemoryResources {
        let info = text(self.proc.join("meminfo"));
        let total = kilobytes(&info, "MemTotal");
        let pages = kilobytes(&info, "HugePages_Total");
        let base = self.sys.join("devices/system/node");
        let nodes = entries(&base).into_iter().filter_map(|name| {
            let node = name.strip_prefix("node")?.parse().ok()?;
            let info = text(base.join(&name).join("meminfo"));
            let total = kilobytes(&info, "MemTotal");
            Some((node, total, total.saturating_sub(kilobytes(&info, "MemFree"))))
        });
        MemoryResources {
            total,
            used: total.saturating_sub(kilobytes(&info, "MemAvailable")),
            free: kilobytes(&info, "MemFree"),
            buffers: kilobytes(&info, "Buffers"),
            cached: kilobytes(&info, "Cached"),
            hugepages_size: kilobytes(&info, "Hugepagesize"),
            hugepages_total: pages * kilobytes(&info, "Hugepagesize"),
            hugepages_used: (pages - kilobytes(&info, "HugePages_Free").min(pages))
                * kilobytes(&info, "Hugepagesize"),
            nodes: nodes.collect(),
            page_size: rustix::param::page_size() as u64,
            huge_pages: self.huge_pages(),
            merging: self.merging(),
        }
    }

    fn huge_pages(&self) -> Vec<(u64, u64, u64)> {
        let base = self.sys.join("kernel/mm/hugepages");
        let sizes = entries(&base).into_iter().filter_map(|name| {
            let size: u64 = name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
            let at = base.join(&name);
            Some((size << 10, number(at.join("nr_hugepages")), number(at.join("free_hugepages"))))
        });
        let mut sizes: Vec<_> = sizes.collect();
        sizes.sort_unstable();
        sizes
    }

    fn merging(&self) -> Option<MergingResources> {
        let base = self.sys.join("kernel/mm/ksm");
        let of = |file: &str| number(base.join(file));
        base.join("run").exists().then(|| MergingResources {
            pages_to_scan: of("pages_to_scan"),
            sleep: of("sleep_millisecs"),
            shared: of("pages_shared"),
            sharing: of("pages_sharing"),
            unshared: of("pages_unshared"),
            volatile: of("pages_volatile"),
            full_scans: of("full_scans"),
            across_nodes: match text(base.join("merge_across_nodes")).as_str() {
                "0" => Some(false),
                "1" => Some(true),
                _ => None,
            },
        })
    }

    fn disks(&self) -> Vec<DiskResources> {
        let base = self.sys.join("block");
        let mut all = vec![];
        for name in entries(&base) {
            let at = base.join(&name);
            // Loop devices, RAM disks and what is made of other disks are no hardware.
            if !at.join("device").exists() {
                continue;
            }
            let partitions = entries(&at).into_iter().filter(|e| at.join(e).join("partition").exists());
            let bus = link(at.join("device/subsystem"));
            all.push(DiskResources {
                device: text(at.join("dev")),
                kind: if name.starts_with("nvme") { "nvme".into() } else { bus },
                model: text(at.join("device/model")),
                serial: match text(at.join("device/serial")) {
                    serial if serial.is_empty() => text(at.join("serial")),
                    serial => serial,
                },
                read_only: number(at.join("ro")) == 1,
                removable: number(at.join("removable")) == 1,
                rotational: number(at.join("queue/rotational")) == 1,
                size: number(at.join("size")) * 512,
                block_size: number(at.join("queue/physical_block_size")),
                partitions: partitions
                    .map(|p| PartitionResources {
                        device: text(at.join(&p).join("dev")),
                        number: number(at.join(&p).join("partition")),
                        size: number(at.join(&p).join("size")) * 512,
                        read_only: number(at.join(&p).join("ro")) == 1,
                        name: p,
                    })
                    .collect(),
                name,
            });
        }
        all
    }

    fn network(&self, pci: &[PciResources]) -> Vec<NetworkResources> {
        let base = self.sys.join("class/net");
        let mut all = vec![];
        for name in entries(&base) {
            let at = base.join(&name);
            // Bridges, tunnels and ends of pairs have no device behind them.
            let Ok(device) = fs::canonicalize(at.join("device")) else { continue };
            // A virtio device stands below its PCI function.
            let function = device.ancestors().find_map(|p| {
                let name = p.file_name()?.to_str()?;
                pci.iter().find(|d| d.address == name)
            });
            all.push(NetworkResources {
                mac: text(at.join("address")),
                driver: link(at.join("device/driver")),
                pci_address: function.map(|d| d.address.clone()).unwrap_or_default(),
                vendor_id: function.map(|d| d.vendor_id.clone()).unwrap_or_default(),
                product_id: function.map(|d| d.product_id.clone()).unwrap_or_default(),
                link: number(at.join("carrier")) == 1,
                speed: number(at.join("speed")),
                duplex: text(at.join("duplex")),
                name,
            });
        }
        all
    }

    fn pci(&self) -> Vec<PciResources> {
        let base = self.sys.join("bus/pci/devices");
        let id = |at: &Path, file: &str| text(at.join(file)).trim_start_matches("0x").to_owned();
        let of = |address: String| {
            let at = base.join(&address);
            PciResources {
                driver: link(at.join("driver")),
                vendor_id: id(&at, "vendor"),
                product_id: id(&at, "device"),
                class: text(at.join("class")),
                // A machine without NUMA says -1.
                numa_node: number(at.join("numa_node")) as u32,
                iommu_group: link(at.join("iommu_group")).parse().ok(),
                address,
            }
        };
        entries(&base).into_iter().map(of).collect()
    }

    fn usb(&self) -> Vec<UsbResources> {
        let base = self.sys.join("bus/usb/devices");
        let devices = entries(&base).into_iter().map(|e| base.join(e));
        // Hubs of class 9 are part of the machine; interfaces have no ids.
        let devices =
            devices.filter(|at| at.join("idVendor").exists() && text(at.join("bDeviceClass")) != "09");
        devices
            .map(|at| UsbResources {
                bus: number(at.join("busnum")) as u32,
                device: number(at.join("devnum")) as u32,
                vendor: text(at.join("manufacturer")),
                vendor_id: text(at.join("idVendor")),
                product: text(at.join("product")),
                product_id: text(at.join("idProduct")),
                serial: text(at.join("serial")),
                speed: text(at.join("speed")).parse().unwrap_or_default(),
            })
            .collect()
    }

    fn system(&self) -> SystemResources {
        let of = |file: &str| text(self.sys.join("class/dmi/id").join(file));
        let virtual_machine = text(self.proc.join("cpuinfo"))
            .lines()
            .any(|l| l.starts_with("flags") && l.split_whitespace().any(|f| f == "hypervisor"));
        SystemResources {
            uuid: of("product_uuid").to_lowercase(),
            vendor: of("sys_vendor"),
            product: of("product_name"),
            family: of("product_family"),
            version: of("product_version"),
            sku: of("product_sku"),
            serial: of("product_serial"),
            kind: if virtual_machine { "virtual-machine" } else { "physical" }.into(),
            firmware: [of("bios_vendor"), of("bios_version"), of("bios_date")],
            motherboard: [of("board_vendor"), of("board_name"), of("board_version"), of("board_serial")],
            chassis: [of("chassis_vendor"), of("chassis_version"), of("chassis_serial")],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_has_processors_and_memory() {
        let r = Machine::default().resources();
        let threads: usize = r.sockets.iter().flat_map(|s| &s.cores).map(|c| c.threads.len()).sum();
        assert!(threads > 0, "{r:?}");
        assert!(r.memory.total > 64 << 20 && r.memory.used <= r.memory.total);
        assert!(r.processes > 0);
        assert!(!r.system.kind.is_empty());
    }

    #[test]
    fn a_tree_is_read_as_the_kernel_writes_it() {
        let d = tempfile::tempdir().unwrap();
        let put = |path: &str, text: &str| {
            let path = d.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        put(
            "proc/cpuinfo",
            "processor\t: 0\nvendor_id\t: V\nmodel name\t: M\ncpu MHz\t\t: 2400.5\nflags\t\t: a b\n\n",
        );
        put(
            "proc/meminfo",
            "MemTotal: 4096 kB\nMemAvailable: 1024 kB\nMemFree: 512 kB\nBuffers: 8 kB\nCached: 16 kB\nSwapCached: 99 kB\nHugePages_Total: 2\nHugePages_Free: 1\nHugepagesize: 2048 kB\n",
        );
        put("proc/stat", "cpu  3 1 2 9 4 1 1 7\ncpu1 1 0 2 3 4 0 0 0\nintr 77 1 2\n");
        put("proc/loadavg", "0.50 1.00 2.00 1/200 77\n");
        put("proc/1/comm", "init");
        put("sys/devices/system/cpu/cpu0/topology/physical_package_id", "0\n");
        put("sys/devices/system/cpu/cpu0/cache/index0/size", "512K\n");
        put("sys/devices/system/cpu/cpu0/cache/index0/level", "2\n");
        put("sys/block/sda/device/model", "Fast disk \n");
        put("sys/block/sda/size", "2048\n");
        put("sys/block/sda/dev", "8:0\n");
        put("sys/block/sda/sda1/partition", "1\n");
        put("sys/block/sda/sda1/size", "1024\n");
        put("sys/block/loop0/size", "8\n");
        put("sys/class/dmi/id/sys_vendor", "Maker\n");
        put("sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages", "1\n");
        put("sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "8\n");
        put("sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", "5\n");
        put("sys/kernel/mm/ksm/run", "1\n");
        put("sys/kernel/mm/ksm/pages_to_scan", "100\n");
        put("sys/kernel/mm/ksm/full_scans", "3\n");
        put("sys/bus/pci/devices/0000:00:02.0/vendor", "0x1af4\n");
        put("sys/bus/pci/devices/0000:00:02.0/numa_node", "-1\n");
        let machine = Machine { proc: d.path().join("proc"), sys: d.path().join("sys") };
        let r = machine.resources();
        assert_eq!((r.sockets.len(), r.sockets[0].name.as_str(), r.sockets[0].frequency), (1, "M", 2400));
        assert_eq!(r.sockets[0].cores[0].threads, [(0, 0, true)]);
        assert_eq!(r.sockets[0].cache, [(2, String::new(), 512 << 10)]);
        assert_eq!((r.memory.total, r.memory.used, r.memory.hugepages_used), (4 << 20, 3 << 20, 2 << 20));
        assert_eq!((r.memory.free, r.memory.buffers, r.memory.cached), (512 << 10, 8 << 10, 16 << 10));
        assert_eq!(r.memory.huge_pages, [(2 << 20, 8, 5), (1 << 30, 1, 0)]);
        let merging = MergingResources { pages_to_scan: 100, full_scans: 3, ..Default::default() };
        assert_eq!(r.memory.merging, Some(merging));
        assert!(r.memory.page_size >= 4096);
        let all = CpuTimes { cpu: None, kernel: 4 * TICK, user: 4 * TICK, idle: 9 * TICK, waiting: 4 * TICK };
        assert_eq!((r.times.len(), &r.times[0], r.times[1].cpu), (2, &all, Some(1)));
        assert_eq!((r.load, r.processes), ([0.5, 1.0, 2.0], 1));
        assert_eq!(r.disks.len(), 1, "a loop device is no hardware");
        assert_eq!((r.disks[0].model.as_str(), r.disks[0].size), ("Fast disk", 1 << 20));
        assert_eq!(r.disks[0].partitions[0].name, "sda1");
        assert_eq!((r.pci[0].vendor_id.as_str(), r.pci[0].numa_node), ("1af4", 0));
        assert_eq!(r.system.vendor, "Maker");
        // Nothing at all is answered too.
        let none = Machine { proc: "/nonexistent".into(), sys: "/nonexistent".into() }.resources();
        assert_eq!(none.sockets, []);
        assert!(none.memory.huge_pages.is_empty() && none.memory.merging.is_none());
    }
}
