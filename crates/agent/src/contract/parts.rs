//! Everything but guests.

use super::*;
use karst_model::{image::DiskFormat, network::Lease};

pub(super) async fn facts(s: &Subject) {
    let facts = s.agent.host_facts(&s.read(), ()).await.unwrap();
    assert!(
        !facts.hostname.is_empty() && !facts.kernel.is_empty() && facts.cpus > 0 && facts.memory > 1 << 20
    );
    assert!(!facts.accelerator.reason.is_empty());
    let kinds: Vec<_> = facts.storage.iter().map(|d| d.kind).collect();
    assert_eq!(kinds, PoolKind::ALL, "of each kind it says whether it can have it");
    assert!(facts.storage_kinds().any(|d| d.kind == PoolKind::Dir), "{:?}", facts.storage);
    let hardware = s.agent.host_resources(&s.read(), ()).await.unwrap();
    assert!(hardware.memory.total > 1 << 20 && !hardware.sockets.is_empty() && hardware.processes > 0);
    assert!(hardware.times.first().is_some_and(|t| t.cpu.is_none() && t.idle > 0), "{:?}", hardware.times);
    match s.agent.host_cpu_models(&s.read(), ()).await {
        Ok(models) => {
            let named = |name: &str| models.iter().find(|m| m.name == name);
            assert!(
                named("max").is_some()
                    && named("qemu64").is_some_and(|m| m.features.contains(&"sse2".into()))
            );
        }
        Err(e) => assert_eq!(e.kind, ErrorKind::Unsupported, "{e:?}: without QEMU there are none"),
    }
    let check = s.agent.self_check(&s.read(), ()).await.unwrap();
    assert!(check.leaks.is_empty(), "{check:?}");
}

/// What names something of the host is granted by its policy or refused, whether it is there or not.
pub(super) async fn interfaces(s: &Subject) {
    for name in ["lo", "karst-no-such", "../x"] {
        let error = s.agent.link_state(&s.read(), name.to_owned()).await.expect_err("it is not granted");
        assert!(matches!(error.kind, ErrorKind::Forbidden | ErrorKind::Invalid), "{error:?}");
    }
}

pub(super) async fn fences(s: &Subject) {
    let spec = PoolSpec::own(PoolId(s.env.uuid()), PoolKind::Dir);
    let error = refused(s.agent.pool_ensure(&s.read(), spec.clone()).await, ErrorKind::Conflict);
    assert!(error.message.contains("fence"), "{error}");
    let mut old = s.change();
    s.agent.pool_ensure(&s.change(), spec.clone()).await.unwrap();
    old.fence.as_mut().unwrap().epoch -= 1;
    refused(s.agent.pool_remove(&old, spec.id).await, ErrorKind::Conflict);
    s.agent.pool_usage(&s.read(), spec.id).await.expect("it is still there");
    s.agent.pool_usage(&old, spec.id).await.expect("reads pass with any fence");
    s.agent.pool_remove(&s.change(), spec.id).await.unwrap();
}

pub(super) async fn audit(s: &Subject) {
    use karst_model::audit::{AuditEntry, AuditRange};
    let before = s.agent.audit_verify(&s.read(), ()).await.unwrap();
    assert_eq!(before.fault, None);
    let entry = |n: u64| AuditEntry {
        origin: (before.head.origin.0 + 1, n),
        time: "2026-01-02T03:04:05Z".parse().unwrap(),
        who: "contract".into(),
        from: String::new(),
        what: "test".into(),
        object: format!("/1.0/instances/c{n}"),
        project: String::new(),
        outcome: "done".into(),
        detail: "a \"quote\"\nand a line".into(),
    };
    refused(s.agent.audit_append(&s.read(), vec![entry(1)]).await, ErrorKind::Conflict);
    let head = s.agent.audit_append(&s.change(), vec![entry(1), entry(2)]).await.unwrap();
    assert_eq!(head.seq, before.head.seq + 2);
    let again = s.agent.audit_append(&s.change(), vec![entry(2), entry(3)]).await.unwrap();
    assert_eq!(again.seq, head.seq + 1, "what is there already is not added again");
    let range = AuditRange { from: head.seq, limit: 10 };
    let page = s.agent.audit_read(&s.read(), range).await.unwrap();
    assert_eq!(page.iter().map(|r| r.entry.clone()).collect::<Vec<_>>(), [entry(2), entry(3)]);
    let after = s.agent.audit_verify(&s.read(), ()).await.unwrap();
    assert_eq!((after.fault, after.head), (None, again));
}

pub(super) async fn pools(s: &Subject) {
    let pool = s.pool().await;
    let spec = PoolSpec::own(pool, PoolKind::Dir);
    s.agent.pool_ensure(&s.change(), spec).await.expect("twice is once");
    let usage = s.agent.pool_usage(&s.read(), pool).await.unwrap();
    assert!(usage.total > 0 && usage.used <= usage.total, "{usage:?}");
    let can = s.agent.pool_abilities(&s.read(), pool).await.unwrap().expect("a directory says what it can");
    assert!(can.owners, "{can:?}");
    let grow = |pool| PoolGrow { pool, size: ByteSize::gib(1) };
    refused(s.agent.pool_grow(&s.change(), grow(pool)).await, ErrorKind::Unsupported);
    refused(s.agent.pool_grow(&s.change(), grow(PoolId(s.env.uuid()))).await, ErrorKind::NotFound);
    let volume = s.volume(pool, InstanceKind::Container, None);
    s.agent.volume_create(&s.change(), volume.clone()).await.unwrap();
    s.agent.pool_flush(&s.read(), pool).await.unwrap();
    refused(s.agent.pool_remove(&s.change(), pool).await, ErrorKind::Conflict);
    let at = VolumeRef { pool, volume: volume.id };
    // Let go of: what is in it stays, and nobody gets it.
    s.agent.pool_close(&s.change(), pool).await.unwrap();
    s.agent.pool_close(&s.change(), pool).await.expect("twice is once");
    refused(s.agent.pool_usage(&s.read(), pool).await, ErrorKind::Conflict);
    refused(s.agent.pool_flush(&s.read(), pool).await, ErrorKind::Conflict);
    refused(s.agent.volume_delete(&s.change(), at).await, ErrorKind::Conflict);
    refused(s.agent.volume_usage(&s.read(), at).await, ErrorKind::Conflict);
    refused(s.agent.pool_remove(&s.change(), pool).await, ErrorKind::Conflict);
    let other = VolumeSpec { id: VolumeId(s.env.uuid()), ..volume.clone() };
    refused(s.agent.volume_create(&s.change(), other).await, ErrorKind::Conflict);
    let found = s.agent.pools_find(&s.read(), crate::PoolsFind { kind: None, source: None }).await.unwrap();
    assert!(found.iter().any(|f| f.spec.id == pool), "it is known all the same");
    let own = PoolSpec::own(pool, PoolKind::Dir);
    s.agent.pool_open(&s.change(), own.clone()).await.unwrap();
    s.agent.pool_open(&s.change(), own.clone()).await.expect("twice is once");
    s.agent.volume_usage(&s.read(), at).await.expect("it is there again");
    s.agent.pool_close(&s.change(), pool).await.unwrap();
    s.agent.pool_ensure(&s.change(), own).await.expect("who makes a pool has it open");
    let unknown = PoolSpec::own(PoolId(s.env.uuid()), PoolKind::Dir);
    refused(s.agent.pool_open(&s.change(), unknown.clone()).await, ErrorKind::Unavailable);
    s.agent.pool_close(&s.change(), unknown.id).await.expect("nobody has it open");
    s.agent.pool_sources(&s.read(), PoolKind::Dir).await.map(|f| assert!(f.is_empty())).unwrap();
    s.agent.volume_delete(&s.change(), at).await.unwrap();
    s.agent.pool_remove(&s.change(), pool).await.unwrap();
    s.agent.pool_remove(&s.change(), pool).await.expect("twice is once");
    refused(s.agent.pool_usage(&s.read(), pool).await, ErrorKind::NotFound);
    refused(s.agent.pool_flush(&s.read(), pool).await, ErrorKind::NotFound);
    refused(s.agent.pool_abilities(&s.read(), pool).await, ErrorKind::NotFound);
}

pub(super) async fn images(s: &Subject) {
    let image = ImageId(s.env.uuid());
    let parts = vec![ImagePart::Unified];
    refused(
        s.agent.image_import(&s.change(), ImageImport { image, parts: parts.clone(), disk: None }).await,
        ErrorKind::NotFound,
    );
    let stage = ImageStage { image, part: ImagePart::Unified };
    let staged = s.agent.image_stage(&s.change(), stage).await.unwrap();
    assert!(staged.value.limit > 0);
    write_all(one(staged.fds), b"not an image at all".to_vec()).await;
    assert_eq!(s.agent.image_staged(&s.read(), ()).await.unwrap(), [image]);
    let check = s.agent.self_check(&s.read(), ()).await.unwrap();
    assert!(check.leaks.is_empty(), "an upload that goes on is no leak: {check:?}");
    let outcome = s.agent.image_import(&s.change(), ImageImport { image, parts, disk: None }).await;
    refused(outcome, ErrorKind::Invalid);
    s.agent.image_delete(&s.change(), image).await.unwrap();
    s.agent.image_delete(&s.change(), image).await.expect("twice is once");
    assert_eq!(s.agent.image_staged(&s.read(), ()).await.unwrap(), []);
    // A disk by itself: in the format that is stated, or not at all.
    let disk = ImageId(s.env.uuid());
    let stage = ImageStage { image: disk, part: ImagePart::Disk };
    for (format, taken) in [(DiskFormat::Vmdk, false), (DiskFormat::Raw, true)] {
        let staged = s.agent.image_stage(&s.change(), stage).await.unwrap();
        write_all(one(staged.fds), vec![7; 1 << 20]).await;
        let request = ImageImport { image: disk, parts: vec![ImagePart::Disk], disk: Some(format) };
        let outcome = s.agent.image_import(&s.change(), request.clone()).await;
        if !taken {
            refused(outcome, ErrorKind::Invalid);
            continue;
        }
        let facts = outcome.unwrap();
        assert_eq!((facts.kind, facts.disk_size), (InstanceKind::VirtualMachine, 1 << 20));
        assert_eq!(facts, s.agent.image_import(&s.change(), request).await.expect("twice is once"));
        let export = s.agent.image_export(&s.read(), disk).await.unwrap();
        let parts: Vec<_> = export.value.iter().map(|f| f.part).collect();
        assert_eq!(parts, [ImagePart::Metadata, ImagePart::Disk]);
    }
    s.agent.image_delete(&s.change(), disk).await.unwrap();
    for (kind, source) in
        [(InstanceKind::Container, &s.container), (InstanceKind::VirtualMachine, &s.machine)]
    {
        let Some(source) = source else { continue };
        let (image, facts) = s.image(source).await;
        assert_eq!((facts.kind, facts.fingerprint.len()), (kind, 64));
        let check = s.agent.self_check(&s.read(), ()).await.unwrap();
        assert!(check.images.contains(&image) && check.leaks.is_empty(), "{check:?}");
        let export = s.agent.image_export(&s.read(), image).await.unwrap();
        assert_eq!(export.value.len(), export.fds.len());
        let mut size = 0;
        for (file, fd) in export.value.iter().zip(export.fds) {
            assert_eq!(read_all(fd).await.len() as u64, file.size, "{file:?}");
            size += file.size;
        }
        assert_eq!(size, facts.size);
        s.agent.image_delete(&s.change(), image).await.unwrap();
        refused(s.agent.image_export(&s.read(), image).await, ErrorKind::NotFound);
    }
}

pub(super) async fn volumes(s: &Subject) {
    let pool = s.pool().await;
    let volume = s.volume(pool, InstanceKind::VirtualMachine, None);
    let at = VolumeRef { pool, volume: volume.id };
    s.agent.volume_create(&s.change(), volume.clone()).await.unwrap();
    s.agent.volume_create(&s.change(), volume.clone()).await.expect("twice is once");
    let check = s.agent.self_check(&s.read(), ()).await.unwrap();
    assert!(check.volumes.contains(&volume.id) && check.leaks.is_empty(), "{check:?}");
    let usage = s.agent.volume_usage(&s.read(), at).await.unwrap();
    let lost = VolumeRef { pool, volume: VolumeId(s.env.uuid()) };
    let elsewhere = VolumeRef { pool: PoolId(s.env.uuid()), volume: volume.id };
    let several = s.agent.volume_usages(&s.read(), vec![lost, at, elsewhere]).await.unwrap();
    assert_eq!(several.len(), 1, "of those that are there: {several:?}");
    assert_eq!((several[0].0, several[0].1.total), (volume.id, usage.total));
    let many = vec![at; MAX_USAGES + 1];
    refused(s.agent.volume_usages(&s.read(), many).await, ErrorKind::TooLarge);
    let resize = |size| VolumeResize { volume: at, size };
    s.agent.volume_resize(&s.change(), resize(ByteSize::gib(12))).await.unwrap();
    s.agent.volume_resize(&s.change(), resize(ByteSize::gib(12))).await.expect("twice is once");
    refused(s.agent.volume_resize(&s.change(), resize(ByteSize::gib(1))).await, ErrorKind::Invalid);
    s.agent.volume_delete(&s.change(), at).await.unwrap();
    s.agent.volume_delete(&s.change(), at).await.expect("twice is once");
    refused(s.agent.volume_usage(&s.read(), at).await, ErrorKind::NotFound);

    let lost = s.volume(PoolId(s.env.uuid()), InstanceKind::Container, None);
    refused(s.agent.volume_create(&s.change(), lost).await, ErrorKind::NotFound);
    let no_image = s.volume(pool, InstanceKind::Container, Some(ImageId(s.env.uuid())));
    refused(s.agent.volume_create(&s.change(), no_image).await, ErrorKind::NotFound);
    s.agent.pool_remove(&s.change(), pool).await.expect("refused ones left nothing");
}

pub(super) async fn networks(s: &Subject) {
    let wanted = NetworkChoose { name: s.bridge.clone(), taken: vec![s.ipv4] };
    let choice = s.agent.network_choose(&s.read(), wanted.clone()).await.unwrap();
    assert_eq!(choice.name, s.bridge, "it is free");
    assert!(!choice.ipv4.contains(&s.ipv4) && !s.ipv4.contains(&choice.ipv4), "{choice:?}");
    if let Some(foreign) = &s.foreign_bridge {
        let wanted = NetworkChoose { name: foreign.clone(), taken: vec![] };
        assert_ne!(s.agent.network_choose(&s.read(), wanted).await.unwrap().name, *foreign);
        let spec = NetworkSpec { bridge: foreign.clone(), ..s.network() };
        refused(s.agent.network_ensure(&s.change(), spec.clone()).await, ErrorKind::Conflict);
        s.agent.network_remove(&s.change(), spec.id).await.expect("unknown is gone already");
    }
    let network = s.network();
    s.agent.network_ensure(&s.change(), network.clone()).await.unwrap();
    s.agent.network_ensure(&s.change(), network.clone()).await.expect("twice is once");
    let state = s.agent.network_state(&s.read(), network.id).await.unwrap();
    assert!(
        state.addresses.iter().any(|(a, p, _)| *a == s.ipv4.addr() && *p == s.ipv4.prefix_len()),
        "{state:?}"
    );
    assert_eq!(s.agent.network_leases(&s.read(), network.id).await.unwrap(), []);
    let acl = karst_model::AclId(s.env.uuid());
    let log = AclLogRead { acl, max: ACL_LOG_BYTES };
    assert_eq!(s.agent.acl_log(&s.read(), log).await.unwrap(), b"", "nobody's has logged nothing");
    s.agent.acl_log_remove(&s.change(), acl).await.expect("unknown is gone already");
    let twin = s.network();
    refused(s.agent.network_ensure(&s.change(), twin).await, ErrorKind::Conflict);

    let address: std::net::Ipv4Addr = (u32::from(s.ipv4.network()) + 77).into();
    let host = NetworkHost {
        mac: "10:66:6a:00:00:77".into(),
        hostname: "fixed".into(),
        ipv4: Some(address),
        ..Default::default()
    };
    let with_host = NetworkSpec { hosts: vec![host.clone()], ..network.clone() };
    s.agent.network_ensure(&s.change(), with_host).await.unwrap();
    // No two guests have one address: refused, and what was there stays.
    let other = NetworkHost { mac: "10:66:6a:00:00:78".into(), hostname: "other".into(), ..host.clone() };
    let mac = NetworkHost { ipv4: Some((u32::from(address) + 1).into()), ..host.clone() };
    for second in [other, NetworkHost { hostname: "other".into(), ..mac }] {
        let both = NetworkSpec { hosts: vec![host.clone(), second], ..network.clone() };
        refused(s.agent.network_ensure(&s.change(), both).await, ErrorKind::Conflict);
    }
    let leases = s.agent.network_leases(&s.read(), network.id).await.unwrap();
    let fixed = Lease {
        hostname: "fixed".into(),
        mac: host.mac,
        address: address.into(),
        fixed: true,
        expires: None,
    };
    assert_eq!(leases, [fixed]);
    // Nobody is on it: it may get another name.
    let renamed = NetworkSpec { bridge: choice_of(&network.bridge), ..network.clone() };
    s.agent.network_ensure(&s.change(), renamed.clone()).await.unwrap();
    s.agent.network_ensure(&s.change(), network.clone()).await.expect("and the old one back");
    // A project's alone, with its walls, and again one that projects share.
    let own = NetworkSpec { owner: Some(karst_model::ProjectId(s.env.uuid())), ..network.clone() };
    s.agent.network_ensure(&s.change(), own).await.unwrap();
    s.agent.network_ensure(&s.change(), network.clone()).await.expect("and without");
    // Stopped it is not there, and can be made again.
    s.agent.network_stop(&s.change(), network.id).await.unwrap();
    s.agent.network_stop(&s.change(), network.id).await.expect("twice is once");
    refused(s.agent.network_state(&s.read(), network.id).await, ErrorKind::NotFound);
    assert!(s.agent.self_check(&s.read(), ()).await.unwrap().leaks.is_empty());
    s.agent.network_ensure(&s.change(), network.clone()).await.expect("once more");
    s.agent.network_remove(&s.change(), network.id).await.unwrap();
    s.agent.network_remove(&s.change(), network.id).await.expect("twice is once");
    refused(s.agent.network_state(&s.read(), network.id).await, ErrorKind::NotFound);
}

/// A name like it.
fn choice_of(bridge: &str) -> String {
    let stem = bridge.trim_end_matches(|c: char| c.is_ascii_digit());
    format!("{}{}", &stem[..stem.len().min(11)], 9_871)
}

pub(super) async fn unknown_things(s: &Subject) {
    let instance = InstanceId(s.env.uuid());
    let generation = Generation { incarnation: 1, n: 1 };
    let guest = GuestRef { instance, generation };
    let mode = karst_model::guest::StopMode::Force;
    s.agent.guest_stop(&s.change(), GuestStop { guest, mode }).await.expect("it does not run already");
    s.agent.guest_destroy(&s.change(), instance).await.expect("it is gone already");
    refused(s.agent.guest_pause(&s.change(), guest).await, ErrorKind::NotFound);
    refused(s.agent.guest_resume(&s.change(), guest).await, ErrorKind::NotFound);
    assert_eq!(s.agent.guest_metrics(&s.read(), vec![instance]).await.unwrap().len(), 0);
    let attach = ConsoleAttach { instance, force: false };
    refused(s.agent.console_attach(&s.read(), attach).await, ErrorKind::NotFound);
    let session = karst_model::SessionId(s.env.uuid());
    s.agent.session_close(&s.read(), session).await.expect("it is over already");
    refused(s.agent.session_wait(&s.read(), session).await, ErrorKind::NotFound);
    let signal = SessionSignal { session, signal: 15 };
    refused(s.agent.session_signal(&s.read(), signal).await, ErrorKind::NotFound);
    let at = VolumeRef { pool: PoolId(s.env.uuid()), volume: VolumeId(s.env.uuid()) };
    s.agent.volume_delete(&s.change(), at).await.expect("it is gone already");
    refused(s.agent.network_leases(&s.read(), NetworkId(s.env.uuid())).await, ErrorKind::NotFound);
}

pub(super) async fn deadlines_and_cancel(s: &Subject) {
    // A deadline that has passed: whatever the call was to do, the answer is a timeout or it was quicker; never a hang.
    let mut context = s.read();
    context.deadline = Duration::from_nanos(1);
    match s.agent.host_facts(&context, ()).await {
        Ok(_) => {}
        Err(e) => assert_eq!(e.kind, ErrorKind::Timeout, "{e:?}"),
    }
    // Many at a time, and each its own answer.
    let pools: Vec<_> = futures::future::join_all((0..20).map(|_| s.pool())).await;
    let context = s.read();
    let usages = pools.iter().map(|pool| s.agent.pool_usage(&context, *pool));
    for usage in futures::future::join_all(usages).await {
        usage.unwrap();
    }
    for pool in pools {
        s.agent.pool_remove(&s.change(), pool).await.unwrap();
    }
}

/// Last: afterwards only higher epochs are heard.
pub(super) async fn epochs(s: &Subject) {
    eprintln!("contract: epochs");
    let pool = s.pool().await;
    let before = s.change();
    s.epoch.fetch_add(5, Ordering::SeqCst);
    s.agent.pool_remove(&s.change(), pool).await.unwrap();
    let spec = PoolSpec::own(pool, PoolKind::Dir);
    let error = refused(s.agent.pool_ensure(&before, spec).await, ErrorKind::Conflict);
    assert!(error.message.contains("epoch"), "{error}");
    refused(s.agent.pool_usage(&s.read(), pool).await, ErrorKind::NotFound);
}
