//! Threads, pins and limits of machines: by documents and by calls, on what runs and on what will.
#![allow(clippy::disallowed_methods)] // a test tool

use crate::{
    define::{define, domain, dump, ready},
    host::{arguments, number},
    support::{Client, Refused, Server},
};
use karst_engine::Context;
use karst_frontend_libvirt::{
    error::Code,
    xdr::{Reader, Typed, Writer},
};
use karst_model::{Config, access::Principal, threads::IoThread};

const LIVE: u32 = 1;
const CONFIG: u32 = 2;
const BOTH: u32 = LIVE | CONFIG;

async fn call(
    client: &mut Client,
    procedure: &str,
    write: impl for<'a> FnOnce(&'a mut Writer) -> &'a mut Writer,
) -> Result<Vec<u8>, Refused> {
    let v1 = client.domain("v1").await;
    client.call(number(procedure), &[v1, arguments(write)].concat()).await
}

fn config(server: &Server) -> Config {
    let admin = Context::new(Principal::system());
    server.engine.instance(&admin, "default", "v1").unwrap().instance.config.clone()
}

async fn threads(server: &Server) -> Vec<IoThread> {
    let admin = Context::new(Principal::system());
    server.engine.machine_figures(&admin, "default", "v1").await.unwrap().unwrap().iothreads
}

fn is(refused: Result<Vec<u8>, Refused>, code: Code, word: &str) {
    let (number, why) = refused.unwrap_err();
    assert!(number == code as i32 && why.contains(word), "{word}: {number} {why}");
}

/// The parameters of an answer that begins with them.
fn parameters(payload: &[u8]) -> Vec<(String, Typed)> {
    let mut r = Reader::new(payload);
    let one = |r: &mut Reader<'_>| {
        let field = r.string()?;
        Ok((
            field,
            match r.u32()? {
                1 => Typed::Int(r.i32()?),
                2 => Typed::Uint(r.u32()?),
                3 => Typed::Llong(r.u64()?.cast_signed()),
                4 => Typed::Ullong(r.u64()?),
                _ => Typed::Text(r.string()?),
            },
        ))
    };
    r.array(64, one).unwrap()
}

fn value(payload: &[u8], field: &str) -> Typed {
    let all = parameters(payload);
    all.iter().find(|(name, _)| name == field).unwrap_or_else(|| panic!("{field} of {all:?}")).1.clone()
}

const TUNED: &str = "<blkiotune><weight>300</weight></blkiotune>\
    <memtune><hard_limit unit='GiB'>1</hard_limit><swap_hard_limit unit='GiB'>1</swap_hard_limit></memtune>\
    <iothreads>2</iothreads><iothreadids><iothread id='4' thread_pool_max='8'/></iothreadids>\
    <cputune><shares>2048</shares><global_period>50000</global_period><global_quota>25000</global_quota>\
    <vcpupin vcpu='0' cpuset='1,3'/><emulatorpin cpuset='2'/><iothreadpin iothread='4' cpuset='0'/></cputune>\
    <numatune><memory mode='restrictive' nodeset='0'/></numatune><os firmware";

fn tuned(changes: &[(&str, &str)]) -> String {
    let all = [
        ("<os firmware", TUNED),
        ("cache='none' discard", "cache='none' iothread='1' discard"),
        (
            "<controller type='usb' model='qemu-xhci'/>",
            "<controller type='scsi' model='virtio-scsi'><driver iothread='4'/></controller>",
        ),
    ];
    let text = domain("v1", &all);
    changes.iter().fold(text, |text, (from, to)| {
        assert!(text.contains(from), "{from}");
        text.replacen(from, to, 1)
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn threads_pins_and_limits_of_a_document_are_keys_and_are_shown() {
    let (server, mut client) = ready().await;
    define(&mut client, &tuned(&[])).await.unwrap();
    for (key, value) in [
        ("hardware.iothreads", "1,4"),
        ("hardware.iothreads.4.thread_pool_max", "8"),
        ("hardware.scsi.iothread", "4"),
        ("limits.cpu", "1"),
        ("limits.cpu.shares", "2048"),
        ("limits.cpu.allowance", "25ms/50ms"),
        ("limits.cpu.pin.0", "1,3"),
        ("limits.cpu.pin.emulator", "2"),
        ("limits.cpu.pin.iothread4", "0"),
        ("limits.disk.priority", "3"),
        ("limits.memory.hard", "1048576KiB"),
        ("limits.memory.swap", "false"),
        ("limits.memory.nodes", "0"),
    ] {
        assert_eq!(config(&server).get(key).map(String::as_str), Some(value), "{key}");
    }
    let shown = dump(&mut client, "v1", CONFIG).await;
    for part in [
        "<iothreads>2</iothreads>",
        "<iothread id='1'/>",
        "<iothread id='4' thread_pool_max='8'/>",
        "<vcpupin vcpu='0' cpuset='1,3'/>",
        "<emulatorpin cpuset='2'/>",
        "<iothreadpin iothread='4' cpuset='0'/>",
        "<global_quota>25000</global_quota>",
        "<shares>2048</shares>",
        "<hard_limit unit='KiB'>1048576</hard_limit>",
        "<weight>300</weight>",
        "<memory mode='restrictive' nodeset='0'/>",
        "iothread='1'",
        "<driver iothread='4'/>",
    ] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    define(&mut client, &shown).await.unwrap();
    assert_eq!(dump(&mut client, "v1", CONFIG).await, shown);
    // And nothing of it without.
    define(&mut client, &domain("v1", &[])).await.unwrap();
    let left: Vec<String> = config(&server).into_keys().collect();
    let ours = |k: &&String| {
        k.starts_with("hardware.iothread") || k.starts_with("limits.") || k.starts_with("hardware.scsi")
    };
    assert_eq!(
        left.iter().filter(ours).collect::<Vec<_>>(),
        ["limits.cpu", "limits.cpu.maximum", "limits.memory", "limits.memory.maximum"]
    );
    let plain = dump(&mut client, "v1", CONFIG).await;
    assert!(!plain.contains("iothread") && !plain.contains("tune>"), "{plain}");
    // As is refused what contradicts itself.
    for (from, to, code, word) in [
        ("iothread='1'", "iothread='3'", Code::XmlError, "Disk iothread '3'"),
        ("<iothreadpin iothread='4'", "<iothreadpin iothread='5'", Code::XmlError, "iothread"),
        ("'GiB'>1</hard_limit>", "'MiB'>300</hard_limit>", Code::ConfigUnsupported, "memtune hard_limit"),
    ] {
        let (number, why) = define(&mut client, &tuned(&[(from, to)])).await.unwrap_err();
        assert!(number == code as i32 && why.contains(word), "{to}: {number} {why}");
    }
    assert_eq!(dump(&mut client, "v1", CONFIG).await, plain, "nothing has changed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn threads_that_serve_disks_come_and_go() {
    let (server, mut client) = ready().await;
    define(&mut client, &domain("v1", &[])).await.unwrap();
    is(
        call(&mut client, "DOMAIN_ADD_IOTHREAD", |w| w.u32(1).u32(LIVE)).await,
        Code::OperationInvalid,
        "running",
    );
    call(&mut client, "DOMAIN_CREATE", |w| w).await.unwrap();
    for id in [2, 7] {
        call(&mut client, "DOMAIN_ADD_IOTHREAD", |w| w.u32(id).u32(BOTH)).await.unwrap();
    }
    assert_eq!(threads(&server).await.iter().map(|t| t.id).collect::<Vec<_>>(), [2, 7]);
    assert_eq!(config(&server)["hardware.iothreads"], "2,7");
    is(call(&mut client, "DOMAIN_ADD_IOTHREAD", |w| w.u32(7).u32(0)).await, Code::InvalidArg, "already");
    is(call(&mut client, "DOMAIN_ADD_IOTHREAD", |w| w.u32(0).u32(0)).await, Code::InvalidArg, "value of 0");
    is(call(&mut client, "DOMAIN_ADD_IOTHREAD", |w| w.u32(1).u32(64)).await, Code::InvalidArg, "flags");

    let ns = Typed::Ullong(4096);
    call(&mut client, "DOMAIN_SET_IOTHREAD_PARAMS", |w| w.u32(7).u32(1).typed("poll_max_ns", &ns).u32(BOTH))
        .await
        .unwrap();
    assert_eq!(threads(&server).await[1].poll_max_ns, Some(4096));
    let params = |field: &'static str, value: Typed, id: u32| {
        move |w: &mut Writer| {
            w.u32(id).u32(1).typed(field, &value).u32(LIVE);
        }
    };
    for (write, code, word) in [
        (params("poll_max_ns", Typed::Ullong(1 << 40), 7), Code::InvalidArg, "out of range"),
        (params("poll_never", Typed::Uint(1), 7), Code::InvalidArg, "poll_never"),
        (params("poll_grow", Typed::Uint(1), 3), Code::InvalidArg, "'3'"),
    ] {
        let refused = call(&mut client, "DOMAIN_SET_IOTHREAD_PARAMS", |w| {
            write(w);
            w
        });
        is(refused.await, code, word);
    }

    call(&mut client, "DOMAIN_PIN_IOTHREAD", |w| w.u32(7).opaque(&[0b1000, 0]).u32(BOTH)).await.unwrap();
    is(
        call(&mut client, "DOMAIN_PIN_IOTHREAD", |w| w.u32(3).opaque(&[1]).u32(LIVE)).await,
        Code::InvalidArg,
        "not found",
    );
    let info = call(&mut client, "DOMAIN_GET_IOTHREAD_INFO", |w| w.u32(LIVE)).await.unwrap();
    let mut r = Reader::new(&info);
    let all = r.array(64, |r| Ok((r.u32()?, r.opaque(64)?.to_vec()))).unwrap();
    assert_eq!((all, r.u32().unwrap()), (vec![(2, vec![255, 255]), (7, vec![8, 0])], 2));

    // What the next start is to have, the machine has not yet.
    call(&mut client, "DOMAIN_ADD_IOTHREAD", |w| w.u32(1).u32(CONFIG)).await.unwrap();
    assert_eq!(threads(&server).await.len(), 2);
    let info = async |client: &mut Client, flags: u32| {
        let info = call(client, "DOMAIN_GET_IOTHREAD_INFO", |w| w.u32(flags)).await.unwrap();
        Reader::new(&info).u32().unwrap()
    };
    assert_eq!((info(&mut client, LIVE).await, info(&mut client, CONFIG).await), (2, 3));

    call(&mut client, "DOMAIN_DEL_IOTHREAD", |w| w.u32(7).u32(BOTH)).await.unwrap();
    let left = config(&server);
    assert!(!left.keys().any(|k| k.contains(".7.") || k.ends_with("iothread7")), "{left:?}");
    assert_eq!(left["hardware.iothreads"], "2");
    is(
        call(&mut client, "DOMAIN_DEL_IOTHREAD", |w| w.u32(7).u32(LIVE)).await,
        Code::InvalidArg,
        "cannot find",
    );
    call(&mut client, "DOMAIN_DESTROY", |w| w).await.unwrap();
    define(&mut client, &tuned(&[])).await.unwrap();
    for (id, user) in [(1, "disk 'vda'"), (4, "the controller")] {
        is(call(&mut client, "DOMAIN_DEL_IOTHREAD", |w| w.u32(id).u32(CONFIG)).await, Code::InvalidArg, user);
    }
    assert_eq!(config(&server)["hardware.iothreads"], "1,4");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn threads_are_pinned_one_by_one() {
    let (server, mut client) = ready().await;
    let two = ("placement='static' current='1'>2<", "cpuset='0-1'>2<");
    define(&mut client, &domain("v1", &[two])).await.unwrap();
    call(&mut client, "DOMAIN_CREATE", |w| w).await.unwrap();
    let maps = async |client: &mut Client, flags: u32| {
        let payload = call(client, "DOMAIN_GET_VCPU_PIN_INFO", |w| w.i32(2).i32(2).u32(flags)).await.unwrap();
        Reader::new(&payload).opaque(64).unwrap().to_vec()
    };
    let emulator = async |client: &mut Client| {
        let payload = call(client, "DOMAIN_GET_EMULATOR_PIN_INFO", |w| w.i32(2).u32(LIVE)).await.unwrap();
        Reader::new(&payload).opaque(64).unwrap().to_vec()
    };
    assert_eq!(maps(&mut client, LIVE).await, [3, 0, 3, 0]);
    let pin = |vcpu: u32, map: [u8; 2], flags: u32| {
        move |w: &mut Writer| {
            w.u32(vcpu).opaque(&map).u32(flags);
        }
    };
    let set = async |client: &mut Client, write: &dyn Fn(&mut Writer)| {
        call(client, "DOMAIN_PIN_VCPU_FLAGS", |w| {
            write(w);
            w
        })
        .await
    };
    // Within the set, and out of it, which it leaves to the others.
    set(&mut client, &pin(1, [2, 0], BOTH)).await.unwrap();
    assert_eq!(
        (maps(&mut client, LIVE).await, config(&server)["limits.cpu"].as_str()),
        (vec![3, 0, 2, 0], "0-1")
    );
    set(&mut client, &pin(0, [0, 0x80], CONFIG)).await.unwrap();
    assert_eq!(maps(&mut client, LIVE).await, [3, 0, 2, 0], "from the next start on");
    assert_eq!(maps(&mut client, CONFIG).await, [0, 0x80, 2, 0]);
    let now = config(&server);
    assert_eq!((now["limits.cpu"].as_str(), now["limits.cpu.pin.default"].as_str()), ("2", "0-1"));
    let shown = dump(&mut client, "v1", CONFIG).await;
    assert!(
        shown.contains("cpuset='0-1'>2<") && shown.contains("<vcpupin vcpu='0' cpuset='15'/>"),
        "{shown}"
    );
    is(set(&mut client, &pin(2, [1, 0], CONFIG)).await, Code::InvalidArg, "out of range");
    is(set(&mut client, &pin(0, [0, 0], CONFIG)).await, Code::InvalidArg, "Empty");

    call(&mut client, "DOMAIN_DESTROY", |w| w).await.unwrap();
    call(&mut client, "DOMAIN_CREATE", |w| w).await.unwrap();
    call(&mut client, "DOMAIN_PIN_EMULATOR", |w| w.opaque(&[4, 0]).u32(BOTH)).await.unwrap();
    assert_eq!(emulator(&mut client).await, [4, 0]);
    assert_eq!(maps(&mut client, LIVE).await, [0, 0x80, 2, 0]);
    call(&mut client, "DOMAIN_PIN_EMULATOR", |w| w.opaque(&[3, 0]).u32(BOTH)).await.unwrap();
    assert!(!config(&server).contains_key("limits.cpu.pin.emulator"), "where all are");
    assert_eq!(emulator(&mut client).await, [3, 0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shares_memory_disks_and_nodes_of_a_machine_are_set() {
    let (server, mut client) = ready().await;
    define(&mut client, &domain("v1", &[])).await.unwrap();
    call(&mut client, "DOMAIN_CREATE", |w| w).await.unwrap();
    let set = async |client: &mut Client, procedure: &str, all: &[(&str, Typed)]| {
        call(client, procedure, |w| {
            w.u32(all.len() as u32);
            for (field, value) in all {
                w.typed(field, value);
            }
            w.u32(BOTH)
        })
        .await
    };
    let get = async |client: &mut Client, procedure: &str, field: &str| {
        let payload = call(client, procedure, |w| w.i32(32).u32(LIVE)).await.unwrap();
        value(&payload, field)
    };
    let (shares, shown) = ("DOMAIN_SET_SCHEDULER_PARAMETERS_FLAGS", "DOMAIN_GET_SCHEDULER_PARAMETERS_FLAGS");
    set(&mut client, shares, &[("cpu_shares", Typed::Ullong(2048)), ("global_quota", Typed::Llong(30_000))])
        .await
        .unwrap();
    assert_eq!(get(&mut client, shown, "cpu_shares").await, Typed::Ullong(2048));
    assert_eq!(get(&mut client, shown, "global_quota").await, Typed::Llong(30_000));
    assert_eq!(get(&mut client, shown, "vcpu_quota").await, Typed::Llong(-1));
    assert_eq!(config(&server)["limits.cpu.allowance"], "30ms/100ms");
    set(&mut client, shares, &[("global_period", Typed::Ullong(50_500))]).await.unwrap();
    assert_eq!(config(&server)["limits.cpu.allowance"], "30ms/50500us");
    set(&mut client, shares, &[("global_quota", Typed::Llong(-1))]).await.unwrap();
    assert_eq!(get(&mut client, shown, "global_period").await, Typed::Ullong(100_000));
    for (field, value, code) in [
        ("vcpu_quota", Typed::Llong(1000), Code::ConfigUnsupported),
        ("emulator_period", Typed::Ullong(1000), Code::ConfigUnsupported),
        ("cpu_shares", Typed::Ullong(1), Code::ConfigUnsupported),
        ("global_period", Typed::Ullong(50_000), Code::ConfigUnsupported),
        ("global_quota", Typed::Llong(5), Code::ConfigUnsupported),
        ("cpu_weight", Typed::Uint(5), Code::InvalidArg),
    ] {
        is(set(&mut client, shares, &[(field, value)]).await, code, field);
    }

    let (memory, shown) = ("DOMAIN_SET_MEMORY_PARAMETERS", "DOMAIN_GET_MEMORY_PARAMETERS");
    is(
        set(&mut client, memory, &[("hard_limit", Typed::Ullong(300_000))]).await,
        Code::ConfigUnsupported,
        "hard_limit",
    );
    is(
        set(&mut client, memory, &[("swap_hard_limit", Typed::Ullong(1 << 20))]).await,
        Code::ConfigUnsupported,
        "swap_hard_limit",
    );
    let both = [("hard_limit", Typed::Ullong(1 << 20)), ("swap_hard_limit", Typed::Ullong(3 << 20))];
    set(&mut client, memory, &both).await.unwrap();
    set(&mut client, memory, &[("soft_limit", Typed::Ullong(1 << 19))]).await.unwrap();
    for (field, kib) in [("hard_limit", 1 << 20), ("swap_hard_limit", 3 << 20), ("soft_limit", 1 << 19)] {
        assert_eq!(get(&mut client, shown, field).await, Typed::Ullong(kib), "{field}");
    }
    assert_eq!(config(&server)["limits.memory.swap"], "2097152KiB");
    let unlimited = Typed::Ullong(9_007_199_254_740_991);
    let none = ["hard_limit", "soft_limit", "swap_hard_limit"].map(|field| (field, unlimited.clone()));
    set(&mut client, memory, &none).await.unwrap();
    let left = config(&server);
    let limit = |key: &&String| key.starts_with("limits.memory.") && *key != "limits.memory.maximum";
    assert_eq!(left.keys().find(limit), None, "{left:?}");

    let (disks, shown) = ("DOMAIN_SET_BLKIO_PARAMETERS", "DOMAIN_GET_BLKIO_PARAMETERS");
    set(&mut client, disks, &[("weight", Typed::Uint(700))]).await.unwrap();
    assert_eq!(get(&mut client, shown, "weight").await, Typed::Uint(700));
    is(set(&mut client, disks, &[("weight", Typed::Uint(750))]).await, Code::ConfigUnsupported, "weight");

    let (nodes, shown) = ("DOMAIN_SET_NUMA_PARAMETERS", "DOMAIN_GET_NUMA_PARAMETERS");
    set(&mut client, nodes, &[("numa_mode", Typed::Int(0)), ("numa_nodeset", Typed::Text("0".into()))])
        .await
        .unwrap();
    assert_eq!(get(&mut client, shown, "numa_nodeset").await, Typed::Text("0".into()));
    is(
        set(&mut client, nodes, &[("numa_mode", Typed::Int(2))]).await,
        Code::ConfigUnsupported,
        "numatune mode",
    );
    let absent = set(&mut client, nodes, &[("numa_nodeset", Typed::Text("0-1".into()))]).await.unwrap_err();
    assert!(absent.1.contains("node 1"), "{absent:?}");
    assert_eq!(config(&server)["limits.memory.nodes"], "0", "refused by the host, and taken back");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rates_of_a_disk_have_bursts_and_are_of_both_ways() {
    let (server, mut client) = ready().await;
    define(&mut client, &domain("v1", &[])).await.unwrap();
    let set = async |client: &mut Client, all: &[(&str, u64)]| {
        call(client, "DOMAIN_SET_BLOCK_IO_TUNE", |w| {
            w.string("vda").u32(all.len() as u32);
            for (field, value) in all {
                w.typed(field, &Typed::Ullong(*value));
            }
            w.u32(CONFIG)
        })
        .await
    };
    let get = async |client: &mut Client, field: &str| {
        let payload =
            call(client, "DOMAIN_GET_BLOCK_IO_TUNE", |w| w.u32(1).string("vda").i32(32).u32(CONFIG)).await;
        value(&payload.unwrap(), field)
    };
    let key = |name: &str| {
        let admin = Context::new(Principal::system());
        let view = server.engine.instance(&admin, "default", "v1").unwrap();
        view.instance.devices["vda"].get(name).cloned()
    };
    // What two rates can say is said by them.
    set(&mut client, &[("read_bytes_sec", 5000), ("write_iops_sec", 70)]).await.unwrap();
    assert_eq!(
        (key("limits.read").as_deref(), key("limits.write").as_deref()),
        (Some("5000"), Some("70iops"))
    );
    let all = [("total_bytes_sec", 5000), ("total_bytes_sec_max", 9000), ("total_bytes_sec_max_length", 3)];
    set(&mut client, &all).await.unwrap();
    assert_eq!(key("limits.rates").as_deref(), Some("total-bytes=5000/9000/3,write-operations=70"));
    assert_eq!((key("limits.read"), key("limits.write")), (None, None));
    assert_eq!(get(&mut client, "total_bytes_sec_max").await, Typed::Ullong(9000));
    assert_eq!(get(&mut client, "write_iops_sec").await, Typed::Ullong(70));
    assert_eq!(get(&mut client, "read_bytes_sec").await, Typed::Ullong(0), "they are said together");
    let shown = dump(&mut client, "v1", 2).await;
    assert!(shown.contains("<total_bytes_sec_max_length>3</total_bytes_sec_max_length>"), "{shown}");
    for (bad, word) in [
        (&[("total_bytes_sec", 5), ("read_bytes_sec", 5)][..], "together"),
        (&[("read_iops_sec_max", 5)], "burst"),
        (&[("write_iops_sec", 5), ("write_iops_sec_max", 4)], "burst"),
        (&[("speed", 5)], "speed"),
    ] {
        is(set(&mut client, bad).await, Code::ConfigUnsupported, word);
    }
    assert_eq!(
        key("limits.rates").as_deref(),
        Some("total-bytes=5000/9000/3,write-operations=70"),
        "as before"
    );
    set(&mut client, &[("total_bytes_sec", 0), ("total_iops_sec", 0)]).await.unwrap();
    assert_eq!((key("limits.rates"), key("limits.read"), key("limits.write")), (None, None, None));
}
