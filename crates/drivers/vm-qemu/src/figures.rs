//! Figures of a running machine: what QEMU counts of its disks, and what the kernel counts of its threads.

use crate::{devices::device_id, launch, machine::Inner, monitor, qmp::Qmp, threads};
use karst_model::{
    Error, Result,
    guest::{BalloonFigures, DiskFigures, MachineFigures, MemoryInside, NicFigures, VcpuFigures},
};
use serde_json::{Value, json};
use std::{collections::BTreeMap, os::unix::fs::MetadataExt, path::PathBuf, time::Duration};

const GREETING: Duration = Duration::from_secs(5);
/// The balloon, in QEMU's tree of objects.
const BALLOON: &str = "/machine/peripheral/balloon";
/// How often a machine tells of its memory when nobody said how often, seconds; as libvirt's tools have it.
const PERIOD: u32 = 10;

async fn connect(machine: &Inner) -> Result<Qmp> {
    Ok(Qmp::connect(&machine.dir, launch::QMP, GREETING).await?.0)
}

/// What a machine has done so far.
pub(crate) async fn of(machine: &Inner) -> Result<MachineFigures> {
    let (disks, nics, pid) = {
        let record = machine.record();
        let disks: Vec<(String, PathBuf)> = record
            .devices
            .iter()
            .flat_map(|d| d.disks.iter().map(|d| (d.slot.clone(), d.path.clone())))
            .collect();
        let nics: Vec<String> = record.nics.iter().map(|n| n.host_interface.clone()).collect();
        (disks, nics, machine.observed.borrow().pid)
    };
    let qmp = connect(machine).await?;
    let blocks = qmp.execute("query-blockstats", json!({})).await?;
    let cpus = qmp.execute("query-cpus-fast", json!({})).await?;
    // A machine without a balloon says so.
    let balloon = qmp.execute("query-balloon", json!({})).await.ok();
    let inside = if balloon.is_some() { inside(machine, &qmp).await } else { None };
    let iothreads = threads::figures(machine, &qmp).await?;
    let dirty_rate = qmp.execute("query-dirty-rate", json!({})).await.ok();
    let dir = machine.dir.clone();
    let sizes = tokio::task::spawn_blocking(move || {
        let size = |(slot, path): (String, PathBuf)| Some((slot, std::fs::metadata(path).ok()?));
        (disks.into_iter().filter_map(size).collect::<Vec<_>>(), monitor::is_marked(&dir))
    });
    let (sizes, monitored) = sizes.await.map_err(|e| Error::internal("files of the guest", e))?;
    let mut disks = disks_of(&blocks);
    for (slot, file) in sizes {
        if let Some(disk) = disks.get_mut(&slot).filter(|_| file.is_file()) {
            (disk.allocation, disk.physical) = (Some(file.blocks() * 512), Some(file.len()));
        }
    }
    let (user_ns, system_ns) = pid.map_or((None, None), process_times);
    Ok(MachineFigures {
        disks,
        nics: nics.into_iter().filter_map(|name| Some((name.clone(), nic(&name)?))).collect(),
        vcpus: vcpus_of(&cpus, |thread| thread_of(pid?, thread)),
        iothreads,
        balloon: balloon.and_then(|b| Some(BalloonFigures { actual: b.get("actual")?.as_u64()?, inside })),
        user_ns,
        system_ns,
        monitored,
        dirty_rate: dirty_rate.as_ref().and_then(monitor::dirty_rate),
    })
}

/// What the system inside tells of its memory. One that was never asked is, from now on.
async fn inside(machine: &Inner, qmp: &Qmp) -> Option<MemoryInside> {
    let stats = json!({"path": BALLOON, "property": "guest-stats"});
    let told = qmp.execute("qom-get", stats).await.ok()?;
    let found = inside_of(&told);
    let period = machine.record().memory_period;
    let seconds = period.unwrap_or(PERIOD);
    if found.is_none()
        && seconds > 0
        && let Err(e) = ask_for_memory(qmp, seconds).await
    {
        tracing::debug!(error = %e, context = e.context, "a guest is not asked for its memory");
    }
    found.filter(|_| period != Some(0))
}

async fn ask_for_memory(qmp: &Qmp, seconds: u32) -> Result<()> {
    let set = json!({"path": BALLOON, "property": "guest-stats-polling-interval", "value": seconds});
    qmp.execute("qom-set", set).await.map(drop)
}

/// Has a machine tell of its memory every so many seconds, or not any more.
///
/// # Errors
/// Unsupported without a balloon.
pub(crate) async fn set_memory_period(machine: &Inner, seconds: u32) -> Result<()> {
    let has = machine.record().hardware.as_ref().is_some_and(|h| h.balloon);
    if !has {
        return Err(Error::unsupported(
            "this virtual machine was made without a balloon, which tells of its memory",
        ));
    }
    ask_for_memory(&connect(machine).await?, seconds).await?;
    let mut record = machine.record();
    record.memory_period = Some(seconds);
    record.write(&machine.dir)
}

/// What `guest-stats` says; nothing before the guest has told anything. What it does not tell is the largest number.
fn inside_of(told: &Value) -> Option<MemoryInside> {
    let told_at = told.get("last-update")?.as_i64().filter(|at| *at > 0)?;
    let stat = |key: &str| told.get("stats")?.get(format!("stat-{key}"))?.as_u64().filter(|n| *n != u64::MAX);
    Some(MemoryInside {
        told_at,
        total: stat("total-memory"),
        free: stat("free-memory"),
        available: stat("available-memory"),
        caches: stat("disk-caches"),
        swapped_in: stat("swap-in"),
        swapped_out: stat("swap-out"),
        major_faults: stat("major-faults"),
        minor_faults: stat("minor-faults"),
        huge_given: stat("htlb-pgalloc"),
        huge_refused: stat("htlb-pgfail"),
    })
}

/// By slot. QEMU names a device by its id, or by its path where the block device is a part of it.
fn disks_of(blocks: &Value) -> BTreeMap<String, DiskFigures> {
    let prefix = device_id("");
    let mut found = BTreeMap::new();
    for block in blocks.as_array().into_iter().flatten() {
        let device = block.get("qdev").and_then(Value::as_str).unwrap_or_default();
        let device = device.strip_prefix("/machine/peripheral/").unwrap_or(device);
        let device = device.split('/').next().unwrap_or_default();
        let Some(slot) = device.strip_prefix(&prefix) else { continue };
        let count = |key: &str| block.pointer(&format!("/stats/{key}")).and_then(Value::as_u64).unwrap_or(0);
        let figures = DiskFigures {
            read_requests: count("rd_operations"),
            read_bytes: count("rd_bytes"),
            read_ns: count("rd_total_time_ns"),
            write_requests: count("wr_operations"),
            write_bytes: count("wr_bytes"),
            write_ns: count("wr_total_time_ns"),
            flush_requests: count("flush_operations"),
            flush_ns: count("flush_total_time_ns"),
            allocation: None,
            physical: None,
        };
        found.insert(slot.to_owned(), figures);
    }
    found
}

/// By index; what the kernel does not tell of a thread is 0.
fn vcpus_of(cpus: &Value, thread: impl Fn(u32) -> Option<VcpuFigures>) -> Vec<VcpuFigures> {
    let mut all: Vec<VcpuFigures> = vec![];
    for cpu in cpus.as_array().into_iter().flatten() {
        let number = |key: &str| cpu.get(key).and_then(Value::as_u64).and_then(|n| u32::try_from(n).ok());
        let Some(index) = number("cpu-index") else { continue };
        let none = VcpuFigures { processor: -1, ..VcpuFigures::default() };
        all.push(VcpuFigures { index, ..number("thread-id").and_then(&thread).unwrap_or(none) });
    }
    all.sort_by_key(|v| v.index);
    all
}

/// An interface of the host: what it receives the guest has sent.
fn nic(name: &str) -> Option<NicFigures> {
    let directory = std::path::Path::new("/sys/class/net").join(name).join("statistics");
    let read = |key: &str| std::fs::read_to_string(directory.join(key)).ok()?.trim().parse().ok();
    Some(NicFigures {
        received_bytes: read("tx_bytes")?,
        received_packets: read("tx_packets")?,
        received_errors: read("tx_errors")?,
        received_drops: read("tx_dropped")?,
        sent_bytes: read("rx_bytes")?,
        sent_packets: read("rx_packets")?,
        sent_errors: read("rx_errors")?,
        sent_drops: read("rx_dropped")?,
    })
}

/// Fields of `/proc/…/stat` after the name, which may hold anything.
fn stat_fields(text: &str) -> Option<Vec<&str>> {
    Some(text.rsplit_once(')')?.1.split_whitespace().collect())
}

/// What the kernel's `sched` file of a thread says of its waiting, nanoseconds: milliseconds there, where it keeps an account of it.
fn waited(sched: &str) -> u64 {
    let is = |name: &str| name.trim().rsplit('.').next() == Some("wait_sum");
    let mut lines = sched.lines().filter_map(|line| line.split_once(':'));
    let found = lines.find(|(name, _)| is(name)).and_then(|(_, value)| value.trim().parse::<f64>().ok());
    found.map_or(0, |milliseconds| (milliseconds * 1e6).max(0.0).round() as u64)
}

/// A thread as a processor's, whose number is not said: its times and the processor of the host that it was last on.
fn thread_of(pid: u32, thread: u32) -> Option<VcpuFigures> {
    let directory = format!("/proc/{pid}/task/{thread}");
    let stat = std::fs::read_to_string(format!("{directory}/stat")).ok()?;
    let fields = stat_fields(&stat)?;
    let number = |n: usize| fields.get(n)?.parse::<u64>().ok();
    // Fields 14 and 15 (times) and 39 (processor) of proc(5), of which two are gone.
    let ticks = number(11)? + number(12)?;
    // Time that it ran, and that it waited for a processor.
    let exact = std::fs::read_to_string(format!("{directory}/schedstat")).unwrap_or_default();
    let mut exact = exact.split_whitespace().map(|n| n.parse::<u64>().ok());
    Some(VcpuFigures {
        index: 0,
        time_ns: exact.next().flatten().unwrap_or(ticks * TICK_NS),
        delay_ns: exact.next().flatten().unwrap_or(0),
        wait_ns: waited(&std::fs::read_to_string(format!("{directory}/sched")).unwrap_or_default()),
        processor: number(36).and_then(|n| i32::try_from(n).ok()).unwrap_or(-1),
    })
}

/// Linux shows times in hundredths of a second.
const TICK_NS: u64 = 10_000_000;

/// Time of a process in user and kernel mode, nanoseconds.
fn process_times(pid: u32) -> (Option<u64>, Option<u64>) {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let time = |n: usize| stat_fields(&text)?.get(n)?.parse::<u64>().ok().map(|t| t * TICK_NS);
    (time(11), time(12))
}

/// A non-maskable interrupt.
pub(crate) async fn interrupt(machine: &Inner) -> Result<()> {
    connect(machine).await?.execute("inject-nmi", json!({})).await.map(drop)
}

/// Wakes a machine that sleeps.
pub(crate) async fn wake(machine: &Inner) -> Result<()> {
    connect(machine).await?.execute("system_wakeup", json!({})).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_guest_does_not_tell_of_its_memory_is_missing() {
        let stats = json!({"stat-total-memory": 1024, "stat-free-memory": u64::MAX, "stat-swap-in": 0});
        let told = inside_of(&json!({"stats": stats, "last-update": 17})).unwrap();
        let wanted =
            MemoryInside { told_at: 17, total: Some(1024), swapped_in: Some(0), ..MemoryInside::default() };
        assert_eq!(told, wanted);
        assert_eq!(inside_of(&json!({"stats": stats, "last-update": 0})), None);
        assert_eq!(inside_of(&json!({})), None);
    }

    #[test]
    fn disks_are_found_by_id_and_by_path() {
        let stats = json!({"rd_operations": 3, "rd_bytes": 1536, "rd_total_time_ns": 9, "wr_operations": 1});
        let blocks = json!([
            {"qdev": "disk-scsi0", "stats": stats},
            {"qdev": "/machine/peripheral/disk-virtio1/virtio-backend", "stats": {"flush_operations": 2}},
            {"qdev": "/machine/unattached/device[3]", "stats": stats},
            {"device": "floppy0", "stats": stats},
        ]);
        let found = disks_of(&blocks);
        assert_eq!(found.keys().collect::<Vec<_>>(), ["scsi0", "virtio1"]);
        assert_eq!((found["scsi0"].read_bytes, found["scsi0"].write_requests), (1536, 1));
        assert_eq!(found["virtio1"].flush_requests, 2);
    }

    #[test]
    fn processors_are_in_order_and_a_lost_thread_counts_nothing() {
        let cpus = json!([
            {"cpu-index": 1, "thread-id": 12}, {"cpu-index": 0, "thread-id": 11}, {"thread-id": 3},
        ]);
        let one = VcpuFigures { index: 9, time_ns: 5, wait_ns: 0, delay_ns: 0, processor: 2 };
        let found = vcpus_of(&cpus, |thread| (thread == 11).then_some(one.clone()));
        let shown: Vec<_> = found.iter().map(|v| (v.index, v.time_ns, v.processor)).collect();
        assert_eq!(shown, [(0, 5, 2), (1, 0, -1)]);
    }

    #[test]
    fn this_thread_has_its_time() {
        let (me, thread) = (std::process::id(), rustix::thread::gettid().as_raw_nonzero().get() as u32);
        assert!(thread_of(me, thread).unwrap().processor >= 0);
        let sched = "karst (1, #threads: 1)\n-----\nse.exec_start  :  1.5\nse.statistics.iowait_sum : 9.0\n\
            se.statistics.wait_sum   :  12.000345\n";
        assert_eq!(waited(sched), 12_000_345);
        assert_eq!(
            (waited(&sched.replace("se.statistics.", "")), waited("nr_switches : 1")),
            (12_000_345, 0)
        );
        assert!(process_times(me).0.is_some() && thread_of(me, 0).is_none());
        assert_eq!(stat_fields("1 (a) b) S 0").unwrap(), ["S", "0"]);
    }
}
