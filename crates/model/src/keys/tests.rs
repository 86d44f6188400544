//! Tests of the table of keys and of what is read of them.

use super::*;
use crate::spec::{CpuAllowance, CpuLimit, MemoryLimit, SwapLimit};

fn cfg(k: &str, v: &str) -> Config {
    Config::from([(k.to_owned(), v.to_owned())])
}

#[test]
fn table_is_sorted_and_unique() {
    assert!(INSTANCE_KEYS.windows(2).all(|w| w[0].name < w[1].name));
}

#[test]
fn unknown_and_malformed_keys_are_refused_by_field() {
    let e = check(&cfg("limits.memroy", "1GiB"), None).unwrap_err();
    assert!(
        e.message.contains("\"limits.memory\"") && e.field.as_deref() == Some("config.limits.memroy"),
        "{e}"
    );
    for (k, v) in
        [("limits.memory", "lots"), ("limits.cpu", "0"), ("limits.cpu", "3-1"), ("limits.processes", "0")]
    {
        assert_eq!(check(&cfg(k, v), None).unwrap_err().field.unwrap(), format!("config.{k}"));
    }
    for (value, fits) in [("1", true), ("7", true), ("", true), ("0", false), ("-1", false), ("1.5", false)] {
        assert_eq!(check(&cfg("snapshots.keep", value), None).is_ok(), fits, "{value:?}");
    }
    assert!(check(&cfg("limits.processes", "5"), Some(InstanceKind::VirtualMachine)).is_err());
    assert!(check(&cfg("user.anything", "x"), None).is_ok());
    assert!(check(&cfg("user.", "x"), None).is_err());
    let e = check(&cfg("environment.A", "x\nlxc.hook.start = /bin/evil"), None).unwrap_err();
    assert_eq!(e.field.as_deref(), Some("config.environment.A"));
}

#[test]
fn the_guest_sees_its_own_keys_only() {
    let mut config = cfg("user.a", "b");
    config.extend(cfg("limits.cpu", "1"));
    config.extend(cfg("cloud-init.user-data", "x"));
    let shown = guest_api(&config).unwrap().unwrap();
    assert_eq!(shown.keys().collect::<Vec<_>>(), ["user.a"]);
    config.extend(cfg("security.guestapi", "false"));
    assert_eq!(guest_api(&config).unwrap(), None);
    assert_eq!(cloud_init(&cfg("user.user-data", "old"), String::new()).user_data.as_deref(), Some("old"));
    let e = security(&cfg("security.idmap.size", "70000")).unwrap_err();
    assert_eq!(e.field.as_deref(), Some("config.security.idmap.size"));
}

#[test]
fn limits_parse() {
    assert_eq!(parse_cpus("x", "0-1,3").unwrap(), CpuLimit::Set { cpus: vec![0, 1, 3] });
    assert_eq!(
        parse_allowance("x", "25ms/100ms").unwrap(),
        CpuAllowance::Quota { quota_us: 25_000, period_us: 100_000 }
    );
    let fine = CpuAllowance::Quota { quota_us: 12_345, period_us: 50_000 };
    assert_eq!(parse_allowance("x", "12345us/50ms").unwrap(), fine);
    assert!(["200%", "999us/50ms", "1ms", "1ms/2s"].iter().all(|bad| parse_allowance("x", bad).is_err()));
    assert_eq!(parse_nodes("x", "1,0-1,3").unwrap(), [0, 1, 3]);
    assert!(["", "x", "2-1", "-1", "1024"].iter().all(|bad| parse_nodes("x", bad).is_err()));
    let mut placed = cfg("limits.cpu.nodes", "0");
    placed.extend(cfg("limits.cpu", "2"));
    placed.extend(cfg("limits.hugepages.2MB", "8MiB"));
    let placed_limits = limits(&placed).unwrap();
    assert_eq!(placed_limits.cpu_nodes.as_deref(), Some(&[0][..]));
    assert_eq!(placed_limits.hugepages["2MB"], ByteSize::mib(8));
    placed.extend(cfg("limits.cpu", "0-1"));
    assert_eq!(limits(&placed).unwrap_err().field.as_deref(), Some("config.limits.cpu.nodes"));
    assert!(check(&cfg("limits.hugepages.3MB", "1MiB"), None).is_err());
    assert!(limits(&cfg("limits.memory", "1MiB")).is_err());
    let nofile = limits(&cfg("limits.kernel.nofile", "10:unlimited")).unwrap().kernel["nofile"];
    assert_eq!((nofile.soft, nofile.hard), (Some(10), None));
    for bad in ["20:10", "unlimited:5", "many", "-1"] {
        assert!(parse_kernel_limit("x", bad).is_err(), "{bad}");
    }
    let e = check(&cfg("limits.kernel.files", "5"), None).unwrap_err();
    assert!(e.message.contains("nofile"), "{e}");
    assert_eq!(parse_swap("x", "1MiB").unwrap(), SwapLimit::Bytes { bytes: 1 << 20 });
    assert!(parse_swap("x", "some").is_err());
}

#[test]
fn memory_is_a_size_or_a_share_of_the_hosts() {
    assert_eq!(parse_memory("x", "512MiB").unwrap(), MemoryLimit::Size { size: ByteSize::mib(512) });
    assert_eq!(parse_memory("x", "50%").unwrap(), MemoryLimit::Share { percent: 50 });
    for bad in ["0%", "101%", "%", "-5%", "1.5%", "5 %", "50%%", "4294967346%", "lots"] {
        let e = check(&cfg("limits.memory", bad), None).unwrap_err();
        assert_eq!(e.field.as_deref(), Some("config.limits.memory"), "{bad}: {e}");
    }
    assert!(limits(&cfg("limits.memory", "0%")).unwrap_err().message.contains("1% to 100%"));
    assert!(parse_swap("x", "50%").is_err(), "that is of memory alone");
    let host = ByteSize::gib(64).bytes();
    let of = |percent: &str| limits(&cfg("limits.memory", percent)).unwrap();
    for (percent, memory) in [("25%", 16 << 10), ("100%", 64 << 10), ("1%", 655)] {
        let mut limits = of(percent);
        assert_eq!(limits.memory, None, "nobody knows before the host");
        assert_eq!(limits.memory_on(host), Some(ByteSize::mib(memory)), "{percent}");
        limits.resolve_share(host).unwrap();
        assert_eq!(limits.memory, Some(ByteSize::mib(memory)));
        // On another host it is another size.
        limits.resolve_share(host / 2).unwrap();
        assert_eq!(limits.memory, limits.memory_on(host / 2));
    }
    let e = of("1%").resolve_share(300 << 20).unwrap_err();
    assert!(e.field.as_deref() == Some("config.limits.memory") && e.message.contains("4MiB"), "{e}");
    let mut sized = of("1GiB");
    sized.resolve_share(0).unwrap();
    assert_eq!((sized.memory, sized.memory_on(0)), (Some(ByteSize::gib(1)), Some(ByteSize::gib(1))));
    // What would be the end of a machine is seen where its size is known.
    let mut hard = cfg("limits.memory", "50%");
    hard.extend(cfg("limits.memory.hard", "1GiB"));
    limits(&hard).unwrap().resolve_share(1 << 30).unwrap();
    let e = limits(&hard).unwrap().resolve_share(2 << 30).unwrap_err();
    assert_eq!(e.field.as_deref(), Some("config.limits.memory.hard"));
}
