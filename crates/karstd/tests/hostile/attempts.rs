//! What a hostile control process tries with each call. A call that is in no row here fails the test.

use crate::{FOREIGN, Karstd, file, id, pool, volume, write};
use karst_agent::{FileWriteRequest, names::host_interface};
use karst_model::{
    guest::FileKind,
    network::BridgeSpec,
    network_names::{DnsHost, NetworkNames},
};
use serde_json::{Value, json};
use std::fs;

/// What is to come of an attempt.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Comes {
    /// It is refused, in words.
    Refused,
    /// It is answered, and nothing has come of it: by this reason.
    Nothing(&'static str),
}
use Comes::{Nothing, Refused};

/// What a control process may ask although it is hostile, and why no request could be wrong.
pub const NO_ARGUMENT: &[&str] = &[
    "audit_verify",
    "host_facts",
    "host_resources",
    "host_cpu_models",
    "self_check",
    "image_staged",
    "guest_observe_all",
    "entry_expected",
];

const GONE: Comes = Nothing("deleting what is not there, which a saga may repeat");

/// A guest: 4 is a container that runs, 24 one that never did, whose root is volume 23; 99 is nobody's.
pub fn guest(n: u128, change: impl FnOnce(&mut Value)) -> Value {
    let root = match n {
        4 => 3,
        _ => 23,
    };
    let mut spec = json!({
        "instance": id(n), "kind": "container", "generation": {"incarnation": 1, "n": 1}, "spec_version": 1,
        "hostname": "c1", "domain_id": 1, "machine": null,
        "limits": {"cpu": null, "cpu_allowance": null, "memory": null, "processes": null},
        "root": {"device": id(5), "name": "root", "slot": "scsi0", "pool": pool(), "volume": id(root)},
        "nics": [], "cloud_init": {"instance_id": "x"}, "environment": {},
    });
    change(&mut spec);
    spec
}

fn machine(key: &str, value: Value) -> Value {
    guest(34, |s| {
        s["kind"] = json!("virtual-machine");
        s["root"]["volume"] = json!(id(13));
        s["machine"] = json!({"machine": "q35", "cpu_model": "max", "firmware": "bios", "uuid": id(34), "accelerator": "tcg"});
        s["machine"][key] = value;
    })
}

/// What is tried with each call: call, what is wrong with it, the request, what comes of it.
pub fn attempts(karstd: &Karstd) -> Vec<(&'static str, String, Value, Comes)> {
    let canary = karstd.base.join("canary").to_str().unwrap().to_owned();
    let mut all = vec![];
    let mut add = |call: &'static str, what: &str, request: Value, comes: Comes| {
        all.push((call, what.to_owned(), request, comes));
    };
    let (no_pool, nobody) = (json!(id(99)), json!(id(99)));
    let generation = |n: u32| json!({"incarnation": 1, "n": n});
    let at = |n: u128| json!({"instance": id(n), "generation": generation(1)});
    let snapshot = |n: u128| json!({"pool": pool(), "volume": id(n), "snapshot": id(8)});
    let elsewhere = json!({"pool": id(99), "volume": id(3)});

    let entry = json!([{"origin": [5, 1], "time": "2026-01-01T00:00:00Z", "who": "x\n{\"seq\":1}", "what": "y", "object": "../../etc",
        "outcome": "done"}]);
    add(
        "audit_append",
        "text that looks like more lines",
        entry,
        Nothing("one record, as the chain's check says below"),
    );
    add("audit_append", "no entry", json!([{"who": canary}]), Refused);
    add(
        "audit_read",
        "beyond every end",
        json!({"from": u64::MAX, "limit": u32::MAX}),
        Nothing("there is no such record"),
    );

    let granted =
        |source: &str| json!({"id": id(7), "kind": "dir", "source": {"kind": "granted", "source": source}});
    for source in ["/etc", "../../etc", "", "/", "/dev/vda", "a\nb"] {
        add("pool_ensure", &format!("in {source:?}"), granted(source), Refused);
        add("pool_open", &format!("in {source:?}"), granted(source), Refused);
        add("pool_survey", &format!("in {source:?}"), json!({"spec": granted(source)}), Refused);
        add("pools_find", &format!("in {source:?}"), json!({"kind": "dir", "source": source}), Refused);
    }
    let describe = |n: u128, own: &str| json!({"pool": id(n), "own": own, "volumes": []});
    add("pool_describe", "none", describe(99, "x"), Refused);
    let said = |volume: Value, text: &str| json!({"pool": pool(), "volumes": [[volume, text]]});
    add("pool_describe", "a volume elsewhere", said(json!("../../../etc/passwd"), "x"), Refused);
    add("pool_describe", "a volume with what ends a line", said(json!(id(3)), "a\u{0}b\u{1b}[2J"), Refused);
    add("pool_describe", "a volume at length", said(json!(id(3)), &"x".repeat((1 << 20) + 1)), Refused);
    add("pool_describe", "a volume of another pool", said(json!(id(99)), "x"), Nothing("it is left out"));
    add("pool_ensure", "of another kind", json!({"id": id(2), "kind": "btrfs"}), Refused);
    add("pool_remove", "with volumes", json!(pool()), Refused);
    add("pool_close", "from which a guest runs", json!(pool()), Refused);
    add("pool_close", "none", no_pool.clone(), GONE);
    add("pool_sources", "of directories", json!("dir"), Nothing("there are none"));
    add("pool_sources", "of no kind", json!("../../etc"), Refused);
    add("pool_usage", "of none", no_pool.clone(), Refused);
    for (what, which) in [("none", no_pool.clone()), ("one without a size", json!(pool()))] {
        add("pool_grow", what, json!({"pool": which, "size": u64::MAX}), Refused);
    }
    add("pool_flush", "of none", no_pool.clone(), Refused);
    add("pool_abilities", "of none", no_pool.clone(), Refused);

    for name in ["$(reboot)", "../x", "a b", ""] {
        add("network_choose", name, json!({"name": name, "taken": []}), Refused);
    }
    let network =
        |bridge: &str| json!({"id": id(1), "bridge": bridge, "spec": BridgeSpec::default(), "hosts": []});
    for bridge in [FOREIGN, "lo", "../../etc/x", "a b", "", "-j", "x/y", "all", "default"] {
        add("network_ensure", bridge, network(bridge), Refused);
    }
    let raw = |lines: &str| json!({"id": id(1), "bridge": "hostile0", "spec": BridgeSpec { raw_dnsmasq: Some(lines.into()), ..Default::default() }, "hosts": []});
    for lines in ["dhcp-script=/bin/sh", "conf-file=/etc/shadow", "address=/a.example/10.0.0.1"] {
        add("network_ensure", &format!("lines that no policy grants: {lines}"), raw(lines), Refused);
    }
    let named = |name: &str| {
        let hosts = vec![DnsHost { address: [10, 0, 0, 1].into(), names: vec![name.into()] }];
        let names = NetworkNames { hosts, ..Default::default() };
        json!({"id": id(1), "bridge": "hostile0", "spec": BridgeSpec { names, ..Default::default() }, "hosts": []})
    };
    for name in ["a\ndhcp-script=/bin/sh", "a b", "a/b", ""] {
        add("network_ensure", &format!("a host of DNS called {name:?}"), named(name), Refused);
    }
    add("network_remove", "none", nobody.clone(), GONE);
    add("network_stop", "none", nobody.clone(), GONE);
    add("network_leases", "of none", nobody.clone(), Refused);
    add("network_state", "of none", nobody.clone(), Refused);
    for name in [FOREIGN, "lo", "../../../etc", ""] {
        add("link_state", &format!("{name:?}, which is not granted"), json!(name), Refused);
    }

    let new = |pool: &Value, content: &str, size: Value, source: Value| json!({"id": id(9), "pool": pool, "content": content, "size": size, "source": source});
    let empty = json!({"kind": "empty"});
    let here = json!(pool());
    add("volume_create", "in no pool", new(&no_pool, "filesystem", Value::Null, empty.clone()), Refused);
    add(
        "volume_create",
        "of no image",
        new(&here, "filesystem", Value::Null, json!({"kind": "image", "image": id(99)})),
        Refused,
    );
    add(
        "volume_create",
        "larger than anything",
        new(&here, "block", json!(1u64 << 62), empty.clone()),
        Refused,
    );
    for (n, content) in [(99, "filesystem"), (3, "block"), (13, "filesystem")] {
        let copy = json!({"kind": "copy", "pool": pool(), "volume": id(n)});
        add("volume_create", &format!("a {content} of {n}"), new(&here, content, Value::Null, copy), Refused);
    }
    let mut other = new(&here, "block", json!(1 << 20), empty.clone());
    other["id"] = json!(id(23));
    add("volume_create", "in the place of another", other, Refused);
    add("volume_delete", "which runs", json!(volume(3)), Refused);
    add("volume_delete", "of another pool", json!({"pool": id(99), "volume": id(23)}), GONE);
    add("volume_resize", "smaller", json!({"volume": volume(13), "size": 512}), Refused);
    add("volume_resize", "larger than anything", json!({"volume": volume(13), "size": 1u64 << 62}), Refused);
    add("volume_resize", "of another pool", json!({"volume": elsewhere, "size": 1 << 30}), Refused);
    add("volume_usage", "of none", json!(volume(99)), Refused);
    add("volume_usage", "of another pool", elsewhere.clone(), Refused);
    add("volume_usages", "more than a call takes", json!(vec![volume(13); 1025]), Refused);
    add("volume_snapshot_create", "of none", snapshot(99), Refused);
    add("volume_snapshot_delete", "of none", snapshot(3), GONE);
    add("volume_snapshot_restore", "under a guest", snapshot(3), Refused);
    add("volume_snapshot_restore", "which is not there", snapshot(23), Refused);
    add("volume_snapshots", "of none", json!(volume(99)), Refused);
    let refresh =
        |to: u128, from: u128| json!({"volume": volume(to), "from": volume(from), "snapshot": null});
    add("volume_refresh", "under a guest", refresh(3, 23), Refused);
    add("volume_refresh", "by another kind", refresh(23, 13), Refused);
    add("volume_refresh", "of nothing", refresh(23, 99), Refused);
    let rebuild = |n: u128, source: &Value| json!({"volume": volume(n), "source": source, "size": null});
    add("volume_rebuild", "under a guest", rebuild(3, &empty), Refused);
    add("volume_rebuild", "of no image", rebuild(23, &json!({"kind": "image", "image": id(99)})), Refused);
    let export = |n: u128, format: &str| json!({"volume": volume(n), "snapshot": null, "format": format});
    for (n, format) in [(13, "tar"), (23, "raw"), (23, "qcow2"), (13, "vmdk"), (99, "tar")] {
        add("volume_export", &format!("{n} as {format}"), export(n, format), Refused);
        add(
            "volume_import",
            &format!("{n} as {format}"),
            json!({"volume": volume(n), "format": format}),
            match format {
                // A disk that VMware wrote is taken in; what comes of a bad one is tried below.
                "vmdk" => continue,
                _ => Refused,
            },
        );
    }
    add("volume_import", "under a guest", json!({"volume": volume(3), "format": "tar"}), Refused);
    add("volume_open", "a tree", json!(volume(23)), Refused);
    add("volume_open", "of none", json!(volume(99)), Refused);

    let backup = |kind: &str, n: u128, snapshots: Value, templates: Value| {
        json!({"id": id(40), "kind": kind, "volume": volume(n), "at": null, "snapshots": snapshots, "index": {"config": {}},
            "templates": templates, "compression": "none"})
    };
    add("backup_create", "of another kind", backup("virtual_machine", 23, json!([]), json!({})), Refused);
    add("backup_create", "raw", backup("raw", 13, json!([]), json!({})), Refused);
    add(
        "backup_create",
        "a template elsewhere",
        backup("container", 23, json!([]), json!({"../../x": "y"})),
        Refused,
    );
    add(
        "backup_create",
        "a snapshot elsewhere",
        backup("container", 23, json!([["../../x", id(8)]]), json!({})),
        Refused,
    );
    add(
        "backup_create",
        "of no snapshot",
        backup("container", 23, json!([["s0", id(8)]]), json!({})),
        Refused,
    );
    add(
        "backup_stage",
        "any",
        json!(id(41)),
        Nothing("a file of the host's own, to be written only; tried below"),
    );
    add("backup_inspect", "of nothing", nobody.clone(), Refused);
    add("backup_inspect", "of an empty file", json!(id(41)), Refused);
    add("backup_open", "of nothing", nobody.clone(), Refused);
    add("backup_open", "which was only staged", json!(id(41)), Refused);
    let fill = |n: u128, kind: &str, snapshot: Value| json!({"volume": volume(n), "backup": id(41), "kind": kind, "snapshot": snapshot});
    add("volume_fill", "of an empty file", fill(23, "container", Value::Null), Refused);
    add("volume_fill", "of a snapshot elsewhere", fill(23, "container", json!("../../x")), Refused);
    add("volume_fill", "under a guest", fill(3, "container", Value::Null), Refused);
    add("volume_fill", "of another kind", fill(23, "block", Value::Null), Refused);
    let mut into = fill(23, "container", Value::Null);
    into["machine"] = json!({"instance": "../../x", "at": null, "firmware": "uefi", "tpm": "../x"});
    add("volume_fill", "of a machine elsewhere", into, Refused);
    let put = |n: u128, staged: u128, offset: u64| json!({"volume": volume(n), "staged": id(staged), "offset": offset});
    add("volume_write", "to a tree", put(23, 41, 0), Refused);
    add("volume_write", "behind the end", put(13, 41, 1 << 40), Refused);
    add("volume_write", "behind all numbers", put(13, 41, u64::MAX), Refused);
    add("volume_write", "of nothing", put(13, 99, 0), Refused);
    let mut image = put(13, 41, 0);
    image["image"] = json!(true);
    add("volume_write", "of an image that is empty", image, Refused);
    add("backup_delete", "which was staged", json!(id(41)), Nothing("it was ours"));
    add("backup_delete", "none", nobody.clone(), GONE);

    add(
        "image_stage",
        "any",
        json!({"image": id(42), "part": "unified"}),
        Nothing("a file of the host's own, to be written only; tried below"),
    );
    add("image_stage", "a part elsewhere", json!({"image": id(42), "part": "../../x"}), Refused);
    let import = |n: u128, parts: Value, disk: Value| json!({"image": id(n), "parts": parts, "disk": disk});
    add("image_import", "of an empty file", import(42, json!(["unified"]), Value::Null), Refused);
    add("image_import", "of nothing", import(99, json!(["unified"]), Value::Null), Refused);
    add("image_import", "of no parts", import(42, json!([]), Value::Null), Refused);
    add("image_import", "of one part as a disk", import(42, json!(["unified"]), json!("qcow2")), Refused);
    for recipe in ["../../etc/passwd", "debian/12; reboot", "", "file:///etc", "debian/../../x"] {
        let request = json!({"image": id(43), "recipe": recipe, "kind": "container"});
        add("image_build", recipe, request, Refused);
    }
    let publish = |n: u128, templates: Value| {
        json!({"image": id(44), "kind": "container", "volume": volume(n), "at": null, "metadata": {}, "templates": templates,
            "compression": "none"})
    };
    add("image_publish", "of none", publish(99, json!({})), Refused);
    add("image_publish", "of a disk", publish(13, json!({})), Refused);
    add("image_publish", "a template elsewhere", publish(23, json!({"../../x": "y"})), Refused);
    add("image_delete", "which was staged", json!(id(42)), Nothing("it was ours"));
    add("image_delete", "none", nobody.clone(), GONE);
    add("image_export", "of none", nobody.clone(), Refused);

    let daemon = fs::read_to_string(karstd.dir.join("id")).unwrap().trim().to_owned();
    let nic = |key: &str, value: Value| {
        let mut nic = json!({"device": id(6), "name": "eth0", "slot": "net0", "guest_name": "eth0", "mac": "10:66:6a:00:00:02",
            "network": id(99), "host_interface": host_interface(&daemon, 1)});
        if key != "network" {
            nic.as_object_mut().unwrap().remove("network");
        }
        nic[key] = value;
        json!([nic])
    };
    let disk = |source: Value| json!([{"device": id(7), "name": "d", "slot": "scsi1", "source": source, "path": "/mnt"}]);
    let host = |path: &str| disk(json!({"kind": "host", "path": path}));
    let node = json!([{"name": "n", "device": {"kind": "char", "source": "/dev/mem", "path": "/dev/mem", "major": 1, "minor": 1}}]);
    let limits = |key: &str, value: Value| {
        let mut limits = json!({"cpu": null, "cpu_allowance": null, "memory": null, "processes": null});
        limits[key] = value;
        limits
    };
    let program = |signal: i32| json!({"command": ["/sbin/init"], "cwd": "/", "uid": 0, "gid": 0, "environment": {}, "stop_signal": signal});
    let wrong = [
        ("/hostname", json!("c1\nlxc.hook.start = /bin/sh")),
        ("/hostname", json!("../../etc")),
        ("/nics", nic("network", json!(id(99)))),
        ("/nics", nic("bridge", json!(FOREIGN))),
        ("/nics", nic("physical", json!({"parent": FOREIGN}))),
        ("/nics", nic("macvlan", json!({"parent": FOREIGN}))),
        ("/nics", nic("point_to_point", json!(["0.0.0.0/0"]))),
        ("/disks", host("/etc")),
        ("/disks", host("/")),
        ("/disks", host(&canary)),
        ("/disks", host("../../etc")),
        ("/disks", disk(json!({"kind": "volume", "pool": id(99), "volume": id(3)}))),
        ("/disks", disk(json!({"kind": "volume", "pool": pool(), "volume": id(99)}))),
        ("/nodes", node),
        ("/security", json!({"raw_lxc": "lxc.hook.start = /bin/sh"})),
        ("/security", json!({"privileged": true})),
        ("/security", json!({"modules": ["../../../tmp/x"]})),
        ("/security", json!({"sysctls": {"kernel.core_pattern": "|/bin/sh"}})),
        ("/security", json!({"sysctls": {"../../kernel/core_pattern": "x"}})),
        ("/security", json!({"idmap_base": 0})),
        ("/limits", limits("cpu_nodes", json!([4096]))),
        ("/limits", limits("hugepages", json!({"../../x": 1 << 21}))),
        ("/application", program(0)),
        ("/application", program(-9)),
        ("/application", program(65)),
        (
            "/files",
            json!([{"path": "/../../../../../../../../tmp/hostile", "content": "x", "uid": 0, "gid": 0, "mode": 420}]),
        ),
        ("/environment", json!({"X": "1\nlxc.hook.pre-start = /bin/touch /tmp/karst-hostile"})),
        ("/environment", json!({"A=B\n": "1"})),
        ("/root/volume", json!(id(99))),
        ("/root/pool", json!(id(99))),
        ("/root/volume", json!(id(13))),
    ];
    for (at, value) in &wrong {
        let change = |s: &mut Value| match s.pointer_mut(at) {
            Some(place) => *place = value.clone(),
            None => s[&at[1..]] = value.clone(),
        };
        add("guest_start", &format!("{at} {value}"), guest(24, change), Refused);
        // A guest's name and program's surroundings are of its start; what it has on the host can change while it runs.
        let granted =
            *at == "/security" && (value.get("privileged").is_some() || value.get("raw_lxc").is_some());
        if granted || ["/nics", "/disks", "/limits", "/root/volume", "/root/pool"].contains(at) {
            add("guest_update", &format!("{at} {value}"), guest(4, change), Refused);
        }
    }
    for interface in [FOREIGN, "lo", "../x", ""] {
        let mut nics = nic("point_to_point", json!([]));
        nics[0]["host_interface"] = json!(interface);
        add("guest_start", &format!("the interface {interface:?}"), guest(24, |s| s["nics"] = nics), Refused);
    }
    add("guest_start", "another's root", guest(24, |s| s["root"]["volume"] = json!(id(3))), Refused);
    add(
        "guest_start",
        "a tree as a machine",
        machine("uuid", json!(id(34))).tap(|s| s["root"]["volume"] = json!(id(23))),
        Refused,
    );
    for (key, value) in [
        ("machine", "q35,dumpdtb=/tmp/hostile"),
        ("machine", "../../x"),
        ("machine", "q35 -daemonize"),
        ("cpu_model", "max,/tmp/hostile -incoming exec:true"),
        ("cpu_model", "max;reboot"),
        ("cpu_model", ""),
    ] {
        add("guest_start", &format!("{key} {value:?}"), machine(key, json!(value)), Refused);
    }
    add("guest_update", "which does not run", guest(24, |_| {}), Refused);
    add("guest_update", "of another start", guest(4, |s| s["generation"] = generation(0)), Refused);
    add(
        "guest_stop",
        "of another start",
        json!({"guest": {"instance": id(4), "generation": generation(0)}, "mode": {"kind": "force"}}),
        Refused,
    );
    add(
        "guest_stop",
        "none",
        json!({"guest": at(99), "mode": {"kind": "force"}}),
        Nothing("what never ran is stopped"),
    );
    let graceful = |n: u128| json!({"guest": at(n), "mode": {"kind": "graceful", "timeout": {"secs": u64::MAX, "nanos": 0}}});
    add("guest_stop", "with all the time there is", graceful(4), Refused);
    add("guest_stop", "none, with all the time there is", graceful(99), Refused);
    let ask = |n: u128, wish: &str| json!({"guest": at(n), "wish": wish, "by": "any"});
    let log = json!({"acl": id(99), "max": u32::MAX});
    add("acl_log", "of none", log, Nothing("what was never logged is nothing"));
    add("acl_log_remove", "none", nobody.clone(), GONE);
    add("neighbours", "of a place", json!({"macs": ["../../x"]}), Refused);
    add("neighbours", "of nobody", json!({"macs": ["02:00:00:00:00:01"]}), Nothing("the kernel knows none"));
    let period = |n: u128, seconds: u64| json!({"guest": at(n), "seconds": seconds});
    add("machine_memory_period", "none", period(99, 1), Refused);
    add("machine_memory_period", "a container", period(4, 1), Refused);
    add("machine_memory_period", "of years", period(4, 1 << 31), Refused);
    add("guest_ask", "none", ask(99, "shutdown"), Refused);
    add("guest_ask", "a container, to boot anew", ask(4, "reboot"), Refused);
    add("guest_ask", "a container, for something else", ask(4, "sh"), Refused);
    add("guest_pause", "of another start", json!({"instance": id(4), "generation": generation(0)}), Refused);
    add("guest_resume", "which is not paused", at(4), Nothing("it goes on"));
    add("guest_quiesce", "none", json!({"guest": at(99), "limit": {"secs": 60, "nanos": 0}}), Refused);
    add(
        "guest_quiesce",
        "a container",
        json!({"guest": at(4), "limit": {"secs": u64::MAX, "nanos": 0}}),
        Nothing("its file systems are the host's"),
    );
    add("guest_thaw", "a container", at(4), Nothing("its file systems are the host's"));
    for call in
        ["guest_pause", "guest_resume", "guest_thaw", "machine_interrupt", "machine_wake", "guest_reset"]
    {
        add(call, "none", at(99), Refused);
    }
    for call in ["machine_interrupt", "machine_wake", "guest_reset"] {
        add(call, "a container", at(4), Refused);
    }
    let state = |n: u128| json!({"instance": id(n), "snapshot": id(8)});
    add(
        "machine_state_save",
        "of a guest that never ran",
        json!({"at": state(99), "memory": true}),
        Nothing("it has none"),
    );
    add(
        "machine_state_save",
        "elsewhere",
        json!({"at": {"instance": "../../x", "snapshot": id(8)}, "memory": false}),
        Refused,
    );
    add("machine_state_restore", "which is not there", json!({"at": state(99), "memory": true}), Refused);
    let copy = |from: u128, to: Value| json!({"from": id(from), "at": null, "to": to, "to_at": null});
    add("machine_state_copy", "elsewhere", copy(99, json!("../../x")), Refused);
    add("machine_state_copy", "of a container", copy(4, json!(id(99))), Refused);
    add("machine_state_copy", "to a container", copy(99, json!(id(4))), Refused);
    add("machine_state_copy", "to itself", copy(99, json!(id(99))), Refused);
    add("machine_state_copy", "of none", copy(99, json!(id(98))), Nothing("it is nothing beside its disk"));
    add("machine_memory_drop", "elsewhere", json!("../../x"), Refused);
    add("machine_memory_drop", "none", nobody.clone(), GONE);
    add("machine_state_delete", "none", state(99), GONE);
    add("machine_state_delete", "elsewhere", json!({"instance": id(4), "snapshot": "../../../x"}), Refused);
    let volume_of = |of: Value| json!({"pool": pool(), "volume": of});
    let begin = |n: u128, to: Value, speed: u64| json!({"guest": at(n), "from": volume_of(json!(id(3))), "to": volume_of(to), "speed": speed, "synchronous": false});
    add("machine_copy_begin", "of a container", begin(4, json!(id(13)), 0), Refused);
    add("machine_copy_begin", "of none", begin(99, json!(id(13)), 0), Refused);
    add("machine_copy_begin", "elsewhere", begin(4, json!("../../x"), 0), Refused);
    add("machine_copy_begin", "faster than can be said", begin(4, json!(id(13)), u64::MAX), Refused);
    let copy = |n: u128, to: Value| json!({"instance": id(n), "to": to});
    add("machine_copy_state", "of none", copy(99, json!(id(13))), Nothing("there is none"));
    add("machine_copy_state", "elsewhere", copy(4, json!("../../x")), Refused);
    add("machine_copy_speed", "of none", json!({"copy": copy(99, json!(id(13))), "speed": 1}), Refused);
    add("machine_copy_speed", "of a container", json!({"copy": copy(4, json!(id(13))), "speed": 1}), Refused);
    let end = |n: u128, to: Value, how: &str| json!({"instance": id(n), "from": volume_of(json!(id(3))), "to": volume_of(to), "end": how});
    add("machine_copy_end", "of a container", end(4, json!(id(13)), "pivot"), Refused);
    add("machine_copy_end", "of none", end(99, json!(id(13)), "cancel"), GONE);
    add("machine_copy_end", "elsewhere", end(4, json!("../../x"), "cancel"), Refused);
    let layers = |n: u128, guest: Value, of: Value| json!({"instance": id(n), "guest": guest, "layers": [{"volume": volume_of(of), "number": 1}]});
    add("machine_layers_add", "of none that runs", layers(99, at(99), json!(id(99))), Refused);
    add("machine_layers_add", "over no disk", layers(99, Value::Null, json!(id(3))), Refused);
    add("machine_layers_add", "elsewhere", layers(4, at(4), json!("../../x")), Refused);
    add("machine_layers_take_back", "elsewhere", layers(4, at(4), json!("../../x")), Refused);
    add("machine_layers_take_back", "of none", layers(99, Value::Null, json!(id(99))), Refused);
    let pull = json!({"merge": "pull", "base": null});
    let merge = |n: u128, of: Value| json!({"guest": at(n), "volume": volume_of(of), "merge": pull.clone(), "speed": 0});
    add("machine_merge_begin", "of a container", merge(4, json!(id(3))), Refused);
    add("machine_merge_begin", "of none", merge(99, json!(id(3))), Refused);
    add("machine_merge_begin", "elsewhere", merge(4, json!("../../x")), Refused);
    let merged = |n: u128, of: Value, how: &str| json!({"instance": id(n), "volume": volume_of(of), "merge": pull.clone(), "end": how});
    add("machine_merge_end", "of a container", merged(4, json!(id(3)), "pivot"), Refused);
    add("machine_merge_end", "of none", merged(99, json!(id(3)), "cancel"), GONE);
    add("machine_merge_end", "elsewhere", merged(4, json!("../../x"), "cancel"), Refused);
    let mark = |of: Value| json!({"id": id(21), "disks": [{"volume": volume_of(of), "before": null}]});
    let create = |n: u128, of: Value| json!({"guest": at(n), "mark": mark(of), "known": []});
    add("machine_checkpoint_create", "of a container", create(4, json!(id(3))), Refused);
    add("machine_checkpoint_create", "of none", create(99, json!(id(3))), Refused);
    add("machine_checkpoint_create", "elsewhere", create(4, json!("../../x")), Refused);
    let delete = |n: u128, of: Value| json!({"instance": id(n), "id": id(21), "disks": [{"volume": volume_of(of), "parent": null, "last": true}]});
    add("machine_checkpoint_delete", "of a container", delete(4, json!(id(3))), Refused);
    add("machine_checkpoint_delete", "of none", delete(99, json!(id(3))), GONE);
    add("machine_checkpoint_delete", "elsewhere", delete(4, json!("../../x")), Refused);
    let asked = |n: u128| json!({"guest": at(n), "volumes": []});
    add("machine_checkpoints", "of a container", asked(4), Refused);
    add("machine_checkpoints", "of none", asked(99), Refused);
    let listening = |n: u128, to: Value, listen: Value| json!({"guest": at(n), "id": id(22), "disks": [{"from": volume_of(json!(id(3))), "since": [], "to": volume_of(to), "export": "vda", "bitmap": "b"}], "mark": null, "known": [], "listen": listen});
    add("machine_backup_begin", "of a container", listening(4, json!(id(13)), Value::Null), Refused);
    add("machine_backup_begin", "of none", listening(99, json!(id(13)), Value::Null), Refused);
    add("machine_backup_begin", "elsewhere", listening(4, json!("../../x"), Value::Null), Refused);
    let anywhere = json!({"transport": "tcp", "address": "0.0.0.0:10809"});
    add("machine_backup_begin", "for everybody to read", listening(4, json!(id(13)), anywhere), Refused);
    let socket = json!({"transport": "unix", "path": "/etc/cron.d/x"});
    add(
        "machine_backup_begin",
        "at a socket elsewhere, of a container",
        listening(4, json!(id(13)), socket),
        Refused,
    );
    let backup = |n: u128| json!({"instance": id(n), "id": id(22)});
    add("machine_backup_state", "of none", backup(99), Nothing("there is none"));
    add("machine_backup_state", "elsewhere", json!({"instance": "../../x", "id": id(22)}), Refused);
    add("machine_backup_end", "of none", backup(99), GONE);
    add("machine_backup_end", "elsewhere", json!({"instance": id(4), "id": "../../x"}), Refused);
    let memory = |n: u128, path: &str| json!({"guest": at(n), "id": id(23), "path": path, "wish": {"save": {"document": "", "paused": false}}});
    add("machine_memory_begin", "of a container", memory(4, "/srv/x"), Refused);
    add("machine_memory_begin", "of none", memory(99, "/srv/x"), Refused);
    add("machine_memory_begin", "over what is the system's", memory(4, "/etc/shadow"), Refused);
    add("machine_memory_begin", "through a way out", memory(4, "/srv/../etc/cron.d/x"), Refused);
    let dump = |n: u128, format: &str| json!({"guest": at(n), "format": format});
    add("machine_memory_dump", "of a container", dump(4, "elf"), Refused);
    add("machine_memory_dump", "of none", dump(99, "elf"), Refused);
    add("machine_memory_dump", "in no form", dump(34, "raw"), Refused);
    let written = |n: u128| json!({"instance": id(n), "id": id(23)});
    add("machine_memory_state", "of none", written(99), Nothing("there is none"));
    add("machine_memory_state", "elsewhere", json!({"instance": "../../x", "id": null}), Refused);
    add("machine_memory_end", "of none", json!({"memory": written(99), "end": "cancel"}), GONE);
    add("machine_memory_end", "kept, of none", json!({"memory": written(99), "end": "keep"}), Refused);
    add(
        "machine_memory_end",
        "elsewhere",
        json!({"memory": {"instance": id(4), "id": "../../x"}, "end": "cancel"}),
        Refused,
    );
    for path in ["/etc/shadow", "/proc/self/mem", "", "x", "/srv/../etc/shadow"] {
        add("memory_file_read", "which is not granted", json!(path), Refused);
        let change = json!({"path": path, "uuid": id(4), "document": "x", "paused": false});
        add("memory_file_change", "which is not granted", change, Refused);
    }
    add("guest_destroy", "which runs", json!(id(4)), Refused);
    add("guest_destroy", "none", nobody.clone(), GONE);
    add("guest_metrics", "of none", json!([id(99)]), Nothing("left out"));
    add("guest_details", "of none", json!([id(99)]), Nothing("left out"));
    add("guest_history", "of none", nobody.clone(), Nothing("there is nothing to be told"));
    add("machine_figures", "of none", json!([id(99), id(4)]), Nothing("left out"));
    for command in ["guest-exec\n{}", "", "guest-ping\"}", "../x"] {
        let request =
            json!({"instance": id(4), "command": command, "arguments": {}, "limit": {"secs": 1, "nanos": 0}});
        add("guest_agent", &format!("{command:?}"), request, Refused);
    }
    add(
        "guest_agent",
        "of none",
        json!({"instance": id(99), "command": "guest-ping", "arguments": {}, "limit": {"secs": 1, "nanos": 0}}),
        Refused,
    );

    for (what, n, command, arguments) in [
        ("of none", 99, "query-status", json!({})),
        ("of a container", 4, "query-status", json!({})),
        ("with another", 4, "query-status\"}\n{\"execute\": \"quit", json!({})),
        ("of no object", 4, "query-status", json!([])),
    ] {
        add(
            "machine_monitor",
            what,
            json!({"instance": id(n), "command": command, "arguments": arguments}),
            Refused,
        );
    }
    add("machine_events", "which no policy grants", json!(null), Refused);
    for (what, n, slot, bytes) in [
        ("of none", 99, "scsi0", 1),
        ("of a container", 4, "scsi0", 1),
        ("of a node that is no disk's", 4, "../../seed-file", 1),
        ("behind any disk", 4, "scsi0", u64::MAX),
    ] {
        let threshold = json!({"guest": at(n), "slot": slot, "bytes": bytes});
        add("machine_threshold", what, threshold, Refused);
    }
    for (what, n, seconds) in [("of none", 99, 1), ("of a container", 4, 1), ("for ever", 4, u32::MAX)] {
        add("machine_dirty_rate", what, json!({"instance": id(n), "seconds": seconds}), Refused);
    }

    let exec = |n: u128, command: Value, key: &str, value: Value| {
        let mut request = json!({"command": command, "environment": {}, "uid": 0, "gid": 0, "cwd": null, "terminal": null, "term": null});
        request[key] = value;
        json!({"instance": id(n), "request": request})
    };
    let sh = json!(["/sbin/init"]);
    for (what, request) in [
        ("in none", exec(99, sh.clone(), "uid", json!(0))),
        ("in one that does not run", exec(24, sh.clone(), "uid", json!(0))),
        ("of nothing", exec(4, json!([]), "uid", json!(0))),
        ("with NUL", exec(4, json!(["/sbin/init\0"]), "uid", json!(0))),
        ("with a variable that is two", exec(4, sh.clone(), "environment", json!({"A=B\0": "x"}))),
        ("as another guest's root", exec(4, sh.clone(), "uid", json!(65_536))),
        ("in a group of nobody", exec(4, sh.clone(), "gid", json!(u32::MAX))),
        ("as nobody that it has", exec(4, sh.clone(), "uid", json!(u32::MAX))),
        ("in a directory with NUL", exec(4, sh.clone(), "cwd", json!("/\0"))),
        ("on a terminal of no name", exec(4, sh.clone(), "uid", json!("0"))),
    ] {
        add("exec_start", what, request, Refused);
    }
    let output = |stream: &str| json!({"instance": id(99), "operation": id(1), "stream": stream});
    for call in ["exec_output_keep", "exec_output_open", "exec_output_delete"] {
        add(call, "of none", output("stdout"), Refused);
        add(call, "of no stream", output("../x"), Refused);
    }
    add("exec_outputs", "of none", nobody.clone(), Refused);
    add("session_resize", "none", json!({"session": id(99), "columns": 0, "rows": 0}), Refused);
    add("session_signal", "none", json!({"session": id(99), "signal": 9}), Refused);
    add("session_wait", "none", nobody.clone(), Refused);
    add("session_close", "none", nobody.clone(), GONE);
    add("console_attach", "none", json!({"instance": id(99), "force": true}), Refused);
    add("console_attach", "one that does not run", json!({"instance": id(24), "force": true}), Refused);
    let port = |id, name: &str| json!({"instance": id, "port": name, "force": true});
    add("port_attach", "none", port(id(99), "a"), Refused);
    add("port_attach", "of a container", port(id(4), "a"), Refused);
    add("port_attach", "by a path", port(id(24), "../../qmp"), Refused);
    add("console_log", "of none", json!({"instance": id(99), "max": u32::MAX, "clear": true}), Refused);
    for chord in ["ctrl; system_reset", "a\nquit", ""] {
        add("guest_keys", &format!("{chord:?}"), json!({"instance": id(4), "chords": [[chord]]}), Refused);
    }
    add("guest_screenshot", "of a container", json!(id(4)), Refused);
    add("display_attach", "of a container", json!(id(4)), Refused);
    for (what, password) in
        [("of a container", "sesame"), ("with what ends a line", "a\nquit"), ("with none", "")]
    {
        let guarded = json!({"instance": id(4), "guard": {"password": password}});
        add("display_attach_guarded", what, guarded.clone(), Refused);
        add("display_attach_spice", what, guarded.clone(), Refused);
        add("display_guard", what, guarded, Refused);
    }
    for (what, of, passphrase) in [
        ("that is none", "guest", ""),
        ("with NUL", "volume", "a\0b"),
        ("for what is no owner", "path", "open sesame"),
    ] {
        let keys = json!({"00000000-0000-0000-0000-000000000001": passphrase});
        add("keys_hand", what, json!({"of": {of: id(4)}, "keys": keys}), Refused);
    }

    for (key, value) in [("uid", u32::MAX), ("gid", u32::MAX), ("mode", 0o1_000_000)] {
        let mut request = json!(FileWriteRequest {
            file: file(24, 23, "/x"),
            write: write("/x", FileKind::Directory, false, None),
        });
        request["write"][key] = json!(value);
        add("file_write", &format!("{key} {value}"), request, Refused);
    }
    for (n, root, path) in [
        (24, 23, "/../../../etc/passwd"),
        (24, 23, "etc/passwd"),
        (24, 23, ""),
        (24, 99, "/etc/passwd"),
        (24, 23, "/proc/1/root/etc/shadow"),
        (24, 23, "/a\0b"),
        (24, 13, "/etc/passwd"),
        (4, 23, "/sbin/init"),
        (99, 3, "/sbin/init"),
        (4, 3, "/../../../etc/passwd"),
        (4, 3, "/a\0b"),
    ] {
        let what = format!("{path:?} of {root} in {n}");
        add("file_open", &what, json!(file(n, root, path)), Refused);
        add("file_delete", &what, json!(file(n, root, path)), Refused);
        let write = FileWriteRequest {
            file: file(n, root, path),
            write: write(path, FileKind::Directory, false, None),
        };
        add("file_write", &what, json!(write), Refused);
    }
    all
}

trait Tap: Sized {
    fn tap(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }
}
impl Tap for Value {}
