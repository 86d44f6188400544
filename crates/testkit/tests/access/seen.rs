//! What those who may little see and hear of others, beyond the table of use cases.

use super::*;

#[test]
fn leases_of_other_projects_are_not_shown() {
    SeededEnv::run(3, |env| async move {
        let f = fixture(&env).await;
        let leases = async |c: &Context, p| f.w.engine.network_leases(c, p, "karstbr0").await.unwrap().len();
        // Addresses come some time after the start.
        karst_env::Env::sleep(&env, Duration::from_secs(5)).await;
        f.w.engine.instance_metrics(&f.w.admin, HERE, "run").await.unwrap();
        assert!(leases(&f.w.admin, HERE).await >= 1);
        assert!(leases(&who(Role::Viewer, Some(f.here)), HERE).await >= 1);
        assert_eq!(leases(&who(Role::Viewer, Some(f.other)), OTHER).await, 0);
    });
}

/// VMIDs are the cluster's: whether one is taken tells of others, and one that was taken is gone for good.
#[test]
fn a_tenant_is_given_its_vmids() {
    SeededEnv::run(5, |env| async move {
        let f = fixture(&env).await;
        let (e, c, tenant) = (&f.w.engine, &f.w.admin, who(Role::Operator, Some(f.here)));
        let chosen = |name: &str, vmid: Option<u32>| CreateInstance {
            vmid: vmid.map(karst_model::Vmid),
            ..container(name)
        };
        let (_, made) = e.instance_create(c, HERE, chosen("a", Some(7000))).await.unwrap();
        assert_eq!(f.w.ended(made).await.error, None);
        let copy = CopyInstance {
            project: HERE.into(),
            name: "a".into(),
            snapshot: None,
            instance_only: false,
            refresh: false,
            exclude_older: false,
            copy: chosen("b", Some(7001)),
        };
        for refused in [
            e.instance_create(&tenant, HERE, chosen("b", Some(7000))).await.map(drop),
            e.instance_create(&tenant, HERE, chosen("b", Some(7001))).await.map(drop),
            e.instance_copy(&tenant, HERE, copy).await.map(drop),
        ] {
            let refused = refused.unwrap_err();
            assert!(
                refused.is(ErrorKind::Forbidden) && refused.field.as_deref() == Some("vmid"),
                "{refused:?}"
            );
        }
        let (_, made) = e.instance_create(&tenant, HERE, chosen("b", None)).await.unwrap();
        assert_eq!(f.w.ended(made).await.error, None);
    });
}

#[test]
fn listeners_hear_of_their_projects_only_and_of_nothing_once_distrusted() {
    use karst_engine::events::EventKind;
    SeededEnv::run(4, |env| async move {
        let f = fixture(&env).await;
        let (e, c) = (&f.w.engine, &f.w.admin);
        let restricted =
            CertificateSettings { restricted: true, projects: vec![OTHER.into()], ..settings("tenant") };
        e.certificate_add(c, certificate('d'), restricted).await.unwrap();
        let tenant = Context::new(e.principal_by_certificate(&"d".repeat(64), "192.0.2.1:5"));
        let mut heard = e.subscribe(&tenant).unwrap();
        // Neither another project's nor the server's.
        e.profile_create(c, HERE, "hidden", UpdateProfile::default()).await.unwrap();
        e.certificate_add(c, certificate('e'), settings("another")).await.unwrap();
        e.profile_create(c, OTHER, "seen", UpdateProfile::default()).await.unwrap();
        let first = heard.recv().await.unwrap();
        let EventKind::Lifecycle { source, .. } = &first.kind else { panic!("{first:?}") };
        assert_eq!(source, "/1.0/profiles/seen");
        assert!(e.operations(&tenant, None).unwrap().is_empty());
        e.certificate_delete(c, &"d".repeat(64)).await.unwrap();
        e.profile_create(c, OTHER, "unheard", UpdateProfile::default()).await.unwrap();
        let quiet = karst_env::EnvExt::timeout(&env, Duration::from_secs(5), heard.recv()).await;
        assert!(quiet.is_err(), "a certificate that is trusted no longer hears nothing");
        assert!(!e.principal_by_certificate(&"d".repeat(64), "").is_known());
    });
}

#[test]
fn a_trust_token_is_used_once_by_whoever_is_first() {
    SeededEnv::run(5, |env| async move {
        let f = fixture(&env).await;
        let (e, c) = (&f.w.engine, &f.w.admin);
        let nobody = Context::new(Principal::anonymous());
        let tenant =
            || CertificateSettings { restricted: true, projects: vec![HERE.into()], ..settings("t") };
        let issued = e.trust_token_issue(c, tenant()).await.unwrap();
        assert_eq!(e.trust_token_issue(c, tenant()).await.unwrap_err().kind, ErrorKind::Conflict);
        let (a, b) = futures::join!(
            e.trust_token_redeem(&nobody, "t", &issued.secret, certificate('1')),
            e.trust_token_redeem(&nobody, "t", &issued.secret, certificate('2'))
        );
        assert!(a.is_ok() != b.is_ok(), "{a:?} {b:?}");
        let added: Vec<_> = e.certificates(c).unwrap().iter().filter(|x| x.name == "t").cloned().collect();
        assert_eq!(added.len(), 1);
        assert!(added[0].restricted && added[0].projects == [f.here]);
        // The secret itself is nowhere.
        let text = format!("{:?}", e.inner().inventory.read().tenancy);
        assert!(!text.contains(&issued.secret));
        // An expired one is worth nothing.
        let hour = Config::from([("core.remote_token_expiry".to_owned(), "1H".to_owned())]);
        e.server_config_update(c, hour, None).await.unwrap();
        let issued = e.trust_token_issue(c, tenant()).await.unwrap();
        karst_env::Env::sleep(&env, Duration::from_secs(3601)).await;
        let late = e.trust_token_redeem(&nobody, "t", &issued.secret, certificate('3')).await;
        assert_eq!(late.unwrap_err().kind, ErrorKind::Forbidden);
        assert!(
            e.operations(c, None)
                .unwrap()
                .iter()
                .all(|o| o.class != karst_model::operation::OperationClass::Token)
        );
        // A revoked one neither.
        let issued = e.trust_token_issue(c, tenant()).await.unwrap();
        e.operation_cancel(c, issued.operation.id).await.unwrap();
        let revoked = e.trust_token_redeem(&nobody, "t", &issued.secret, certificate('3')).await;
        assert_eq!(revoked.unwrap_err().kind, ErrorKind::Forbidden);
    });
}
